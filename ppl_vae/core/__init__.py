"""Model/guide pairs, their traces, validation of arguments, results."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
