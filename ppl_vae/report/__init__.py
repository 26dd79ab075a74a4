"""Output for readers: tables on a terminal, reports in HTML, files of results.

They write the files of ``ppl-vae lineage``, and the pages of fitted models and evaluations.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
