"""Likelihoods p(x | z)."""
