"""Accelerators, their memory, and the tensors that stand on them."""
