"""Plots of what the package computes."""
