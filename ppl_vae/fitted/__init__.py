"""Models fitted to tables: program, columns, units and the metadata of the fit, in one folder."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
