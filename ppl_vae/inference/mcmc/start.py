"""What samplers of PPCA's posterior have in common: checks, caveats and starting points."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.arrays.digest import tensor_digest
from ppl_vae.core.arrays.inputs import learn_schema
from ppl_vae.core.arrays.schema import TableSchema
from ppl_vae.core.processes.ranks import Processes
from ppl_vae.core.validation import ArrayLike
from ppl_vae.data.column_stats import ColumnStats
from ppl_vae.data.sources.row_blocks import RowSource
from ppl_vae.models.bayesian_ppca import BayesianPPCA, ParameterDraws
from ppl_vae.models.linear.table_statistics import TableStatistics
from ppl_vae.models.priors import InverseGammaScale

MAX_UNIT_RATIO = 100.0
"""The ratio of a prior's scale to that of the data above which a note is made."""


def statistics_for(
    function: str,
    model: BayesianPPCA,
    x: RowSource | TableStatistics,
    mask: ArrayLike | None = None,
    **arguments: Any,
) -> TableStatistics:
    """The statistics of x for a model; x may be the statistics themselves.

    Among several processes they are those of the rows of all of them.

    Args:
        function: the name of the public function, for messages.
        model: the model.
        x: the rows of this process.
        mask: True where observed.
        **arguments: what must be the same on all processes.

    Raises:
        ProcessError: if another process fails.
        ValueError: if processes have different arguments; if x has another width than the model,
            or a column with nothing observed; if latent_dim is not smaller than data_dim.
    """
    processes = Processes.current()
    processes.agree(function, **{"the model": _describe(model)}, **arguments)
    if model.latent_dim >= model.data_dim:
        raise ValueError(
            f"latent_dim must be smaller than data_dim, {model.data_dim}, to sample the posterior "
            f"(otherwise the loadings explain all variance); got {model.latent_dim}"
        )
    device = next(model.loc_prior.buffers()).device
    if isinstance(x, TableStatistics):
        statistics = x
    else:
        statistics = TableStatistics.of(x, mask, device, model.schema, processes)
    if len(statistics.mean) != model.data_dim:
        raise ValueError(
            f"x must have {model.data_dim} columns, as the model has; it has "
            f"{len(statistics.mean)}. Use BayesianPPCA.like(x, {model.latent_dim})"
        )
    learn_schema(model, TableSchema.of(x))
    return statistics


def _describe(model: BayesianPPCA) -> str:
    digest = tensor_digest(value.detach() for value in model.state_dict().values())
    return f"{repr(model).splitlines()[0]} with priors of checksum {digest[:16]}"


def overdispersed_start(model: BayesianPPCA, columns: ColumnStats, chains: int) -> ParameterDraws:
    """Starting points of chains, spread more widely than the posterior.

    In units of the columns' standard deviations W is normal with a scale between 0.03 and 1, mu is
    normal around the means, and sigma lies between 0.1 and 1; both scales are uniform on a
    logarithmic axis.
    """
    deviation = columns.variance.nan_to_num().sqrt()
    typical = deviation.square().mean().sqrt()
    deviation = torch.where(deviation > 0, deviation, typical if typical > 0 else 1.0)

    def between(low: float) -> Float[Tensor, "C 1"]:
        return low ** torch.rand(chains, 1).to(deviation)

    loadings = torch.randn(chains, model.data_dim, model.latent_dim).to(deviation)
    loc = columns.mean + deviation * torch.randn(chains, model.data_dim).to(deviation)
    scale = between(0.1) * deviation
    if model.noise == "isotropic":
        scale = scale.square().mean(-1).sqrt()
    loadings = loadings * between(0.03).unsqueeze(-1) * deviation[:, None]
    return ParameterDraws(loadings, loc, scale, None)


def prior_notes(model: BayesianPPCA, columns: ColumnStats) -> tuple[str, ...]:
    """Caveats: constant columns, few rows, and priors that contradict the units of the data."""
    return (*columns.notes(), *_rank_notes(model, columns), *_unit_notes(model, columns))


def _rank_notes(model: BayesianPPCA, columns: ColumnStats) -> Iterator[str]:
    if model.latent_dim >= columns.rank():
        yield (
            f"latent_dim={model.latent_dim} is not smaller than the rank of the centred data, at "
            f"most {columns.rank()} ({columns.rows} rows): the noise is determined by its prior"
        )


def _unit_notes(model: BayesianPPCA, columns: ColumnStats) -> Iterator[str]:
    deviation = columns.variance.sqrt()
    if model.noise == "isotropic":  # its columns have one unit; some may vary little in it
        deviation = columns.variance.mean().sqrt().expand_as(deviation)
    expected = {
        "loadings_prior": _scale(model.loadings_prior().base_dist.stddev),
        "noise_prior": _noise_scale(model),
    }
    for name, scale in expected.items():
        ratio = (scale.to(deviation).expand_as(deviation) / deviation).log().abs()
        ratio = torch.where((deviation > 0) & ratio.isfinite(), ratio, 0.0).exp()
        if (largest := float(ratio.max())) > MAX_UNIT_RATIO:
            column = (
                f"column {int(ratio.argmax())}" if model.noise == "diagonal" else "the columns"
            )
            yield (
                f"{name} contradicts the units of the data: in {column} its scale and the "
                f"standard deviation of x differ by a factor of {largest:.3g}; "
                "BayesianPPCA.like(x) has priors in the units of x"
            )
    loc = model.loc_prior().base_dist
    distance = (columns.mean - loc.mean.to(deviation)).abs() / loc.stddev.to(deviation)
    distance = distance.nan_to_num(posinf=0.0)
    if (largest := float(distance.max())) > MAX_UNIT_RATIO:
        yield (
            f"loc_prior contradicts the units of the data: the mean of column "
            f"{int(distance.argmax())} lies {largest:.3g} of its standard deviations away; "
            "BayesianPPCA.like(x) has priors in the units of x"
        )


def _scale(stddev: Float[Tensor, "D K"]) -> Float[Tensor, " D"]:
    return stddev.square().mean(-1).sqrt()


def _noise_scale(model: BayesianPPCA) -> Tensor:
    # The mode of sigma^2 under the conjugate prior, which always exists; else the mean.
    prior = model.noise_prior().base_dist if model.noise == "diagonal" else model.noise_prior()
    if isinstance(prior, InverseGammaScale):
        return (prior.rate / (prior.concentration + 1)).sqrt()
    return prior.mean
