"""Estimates of log p(x), and whether they are reliable."""
