"""Likelihoods: p(x given z)."""
