"""Whether there is a log p(x) to estimate, and a guide whose draws can be weighed."""

from typing import Any

from torch import Tensor

from ppl_vae.core.batch import Batch
from ppl_vae.core.pair import Pair
from ppl_vae.core.program import ProgramLike
from ppl_vae.core.state import dry_run_eval
from ppl_vae.objectives.divergences import check_densities

WAY_OUT = (
    "use a guide with a scale, or log_likelihood(model, None, x, method='annealed'), which needs "
    "no guide"
)


def check_importance_samplable(
    model: ProgramLike, guide: ProgramLike, x: Tensor, keywords: dict[str, Any]
) -> None:
    """Check that log weights of a pair are weights.

    Args:
        model, guide: any pair under the contract.
        x: a block of data.
        keywords: what the pair is told of it.

    Raises:
        ValueError: if the model's prior does not integrate to one, or the guide is a point; what
            :func:`ppl_vae.core.traces.check_pair` refuses.
    """
    with dry_run_eval(model, guide):
        run = Pair(model, guide).run(Batch(x, **keywords))
    check_densities(run, WAY_OUT)
