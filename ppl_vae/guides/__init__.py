"""Guides: q(z given x)."""
