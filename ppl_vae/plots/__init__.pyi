from .lineage import (
    plot_em as plot_em,
)
from .lineage import (
    plot_gaps as plot_gaps,
)
from .lineage import (
    plot_svi as plot_svi,
)

__all__ = [
    "plot_em",
    "plot_gaps",
    "plot_svi",
]
