"""ArviZ, of version 0.x or 1.x, imported only when it is used because that is slow."""

import warnings
from typing import Any, TypeAlias

ArvizData: TypeAlias = Any
"""``arviz.InferenceData`` where ArviZ 0.x is installed, ``xarray.DataTree`` where 1.x is."""


def installed_arviz() -> Any:
    """The module ArviZ."""
    with warnings.catch_warnings():
        # ArviZ 0.x announces 1.x, which this package supports, once a day.
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    return arviz


def as_installed(tree: Any) -> ArvizData:
    """An ``xarray.DataTree`` as the type that the installed ArviZ takes."""
    convert = getattr(installed_arviz(), "from_datatree", None)  # ArviZ 1.x uses trees
    return tree if convert is None else convert(tree)
