"""Guides q(z | x)."""
