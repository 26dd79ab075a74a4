"""Plots of results, one module per subject; every plotting function is named ``plot_...``."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
