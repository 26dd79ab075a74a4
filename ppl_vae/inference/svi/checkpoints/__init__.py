"""Checkpoint files of a stochastic fit, and what identifies the fit that they belong to."""
