"""Data at the boundary: arrays and frames of every library, as tensors, and results as frames."""
