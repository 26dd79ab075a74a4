"""Plots of results, one module per subject; every plotting function is named ``plot_...``."""
