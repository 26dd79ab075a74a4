"""Data that are read in blocks of rows, since they may be larger than memory."""
