"""Guides with free parameters for each datum, fitted where a pair is evaluated."""
