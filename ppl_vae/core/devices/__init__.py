"""Accelerators, their memory, and the tensors on them."""
