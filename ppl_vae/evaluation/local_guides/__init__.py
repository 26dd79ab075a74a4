"""Guides with free parameters for each datum, which evaluations fit and discard."""
