"""Draws from the posterior of parameters, by chain, with their diagnostics."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.arrays.inputs import labels_of, schema_of
from ppl_vae.core.arrays.schema import RowLabels
from ppl_vae.core.installed_arviz import ArvizData, as_installed
from ppl_vae.core.results import NO_LABELS, UNSAVED, Result
from ppl_vae.core.state import seeded
from ppl_vae.core.stats import standard_error
from ppl_vae.core.validation import ArrayLike, as_matrix, check_int
from ppl_vae.data.sources.row_blocks import WORKING_FLOATS, RowBlock, RowBlocks, RowSource
from ppl_vae.inference.mcmc.convergence import MAX_ELEMENTS, Diagnostics, diagnose
from ppl_vae.inference.mcmc.invariants import canonical_loadings, covariance, subspace_projection
from ppl_vae.models.bayesian_ppca import BayesianPPCA, ParameterDraws
from ppl_vae.models.linear.integrated_likelihood import row_log_likelihood


@dataclass(frozen=True)
class PredictiveDensity(Result):
    """The posterior predictive density of each row, log E p(x_n | parameters).

    Attributes:
        value: in nats, (N,).
        standard_error: the standard error of ``value``, in nats, from batch means along the
            chains, (N,).
        labels: the labels of the rows, if they were of a frame; ``to_frame`` returns such a frame.
    """

    value: Tensor
    standard_error: Tensor
    labels: RowLabels = field(default=NO_LABELS, metadata=UNSAVED)


@dataclass(frozen=True, repr=False)
class PosteriorSamples(Result):
    """Draws from the posterior of a model's parameters.

    Attributes:
        draws: by the names of the sites, (chains, S, ...), float64.
        sampler: the algorithm.
        seconds: the time that sampling took, warm-up and passes over the data included.
        num_data: N.
        divergences: the number of divergent transitions after the warm-up.
        acceptance: the mean acceptance probability of proposals after the warm-up; None if none
            was made.
        notes: caveats.
        model: the sampled program; not saved.
    """

    draws: dict[str, Tensor]
    sampler: str
    seconds: float
    num_data: int
    divergences: int = 0
    acceptance: float | None = None
    notes: tuple[str, ...] = ()
    model: Any = field(default=None, metadata=UNSAVED)

    @property
    def num_chains(self) -> int:
        """The number of chains."""
        return next(iter(self.draws.values())).shape[0]

    @property
    def num_samples(self) -> int:
        """The number of draws of each chain, S."""
        return next(iter(self.draws.values())).shape[1]

    def parameters(self) -> ParameterDraws:
        """The draws of all chains as parameters of probabilistic PCA, (chains * S, ...).

        Raises:
            ValueError: if the sites are not those of
                :class:`~ppl_vae.models.bayesian_ppca.BayesianPPCA`.
        """
        loadings, loc, scale, relevance = self._by_chain("parameters")
        return ParameterDraws(
            loadings.flatten(0, 1),
            loc.flatten(0, 1),
            scale.flatten(0, 1),
            None if relevance is None else relevance.flatten(0, 1),
        )

    def invariants(self) -> dict[str, Tensor]:
        """The quantities that the data identify, (chains, S, ...).

        Of probabilistic PCA these are ``loc``, ``noise_scale``, the ``covariance`` W W' + Psi, the
        projection onto the column space of W (``subspace``), and the ``canonical_loadings``, of
        which columns are left out whose singular values are too close to each other or to zero
        (see :func:`~ppl_vae.inference.mcmc.invariants.canonical_loadings`). Of other models they
        are the sites themselves.
        """
        if not self._is_ppca:
            return dict(self.draws)
        parameters = self._by_chain("invariants")
        canonical = canonical_loadings(parameters).loadings
        quantities = {
            "loc": parameters.loc,
            "noise_scale": parameters.noise_scale,
            "covariance": covariance(parameters),
            "subspace": subspace_projection(parameters),
        }
        return quantities | ({"canonical_loadings": canonical} if canonical.shape[-1] else {})

    def diagnostics(self, max_elements: int | None = MAX_ELEMENTS) -> Diagnostics:
        """R-hat and effective sample sizes of :meth:`invariants`.

        Args:
            max_elements: the number of elements of each quantity that are examined; None for all.
        """
        if max_elements == MAX_ELEMENTS:
            return self._diagnostics
        return diagnose(self.invariants(), max_elements)

    @cached_property
    def _diagnostics(self) -> Diagnostics:
        return diagnose(self.invariants())

    @property
    def verdict(self) -> str:
        """Whether the draws can be trusted, why, and if not what to do, in one sentence."""
        return self._diagnostics.verdict(self.divergences)

    def log_likelihood(
        self, x: RowSource, mask: ArrayLike | None = None
    ) -> Float[Tensor, "chains S N"]:
        """log p(x_n | parameters), z integrated out, of each row and each draw, in nats.

        Args:
            x: rows; NaN marks a missing value.
            mask: True where observed.
        """
        shape = self.num_chains, self.num_samples, -1
        parts = self._each_block(x, mask, lambda values: values.reshape(shape))
        return torch.cat(parts, -1)

    def log_predictive(self, x: RowSource, mask: ArrayLike | None = None) -> PredictiveDensity:
        """The posterior predictive density of each row, log E p(x_n | parameters), in nats.

        Args:
            x: rows; NaN marks a missing value.
            mask: True where observed.
        """
        parts = self._each_block(x, mask, self._predictive)
        value, error = (torch.cat(part) for part in zip(*parts, strict=True))
        return PredictiveDensity(value, error, labels_of(x, self.model))

    def _predictive(self, log_p: Float[Tensor, "T B"]) -> tuple[Tensor, Tensor]:
        # The error of the mean of p over correlated draws, by batch means of about sqrt(S) draws
        # (Flegal, Jones 2010), relative to the mean.
        largest = log_p.amax(0)
        mean = (log_p - largest).exp().mean(0)
        batches = max(2, int(self.num_samples**0.5))
        size = self.num_samples // batches
        chains = (log_p - largest).exp().reshape(self.num_chains, self.num_samples, -1)
        means = chains[:, : batches * size].unflatten(1, (batches, size)).mean(2).flatten(0, 1)
        return largest + mean.log(), standard_error(means.mT) / mean

    def _each_block(
        self, x: RowSource, mask: ArrayLike | None, function: Callable[[Tensor], Any]
    ) -> list[Any]:
        # A function of log p (chains * S, B) of each block of rows.
        loadings, loc, noise_scale, _ = self.parameters()
        blocks = RowBlocks(
            x, mask, device=loadings.device, schema=schema_of(self.model), keep_empty_rows=True
        )
        return [
            function(self._log_p(block, loadings, loc, noise_scale))
            for block in blocks.read(max(len(loc), WORKING_FLOATS // 2**20))
        ]

    def _log_p(self, block: RowBlock, *parameters: Tensor) -> Float[Tensor, "T B"]:
        width = parameters[1].shape[-1]
        if block.values.shape[1] != width:
            raise ValueError(
                f"x must have {width} columns, as many as the data of the fit; it has "
                f"{block.values.shape[1]}"
            )
        return row_log_likelihood(block, *parameters)

    def thin(self, n: int) -> Self:
        """Every n-th draw of each chain."""
        step = check_int("n", n)
        return replace(self, draws={k: v[:, ::step] for k, v in self.draws.items()})

    def to_arviz(
        self,
        x: RowSource | None = None,
        mask: ArrayLike | None = None,
        *,
        predictive: bool = False,
        seed: int | None = None,
    ) -> ArvizData:
        """The draws for ArviZ, with the pointwise marginal log-likelihood if x is given.

        Of probabilistic PCA the posterior has the canonical loadings too, since the draws of
        ``loadings`` itself may be rotated against each other.

        Args:
            x: the data of the fit, for ``arviz.loo``; NaN marks a missing value.
            mask: True where observed.
            predictive: whether to add the groups ``posterior_predictive``, a data set like x for
                each draw (S x N x D values; see :meth:`thin`), and ``observed_data``, for
                ``arviz.plot_ppc``. It needs x, as a matrix.
            seed: seed of the predictive draws.

        Raises:
            ValueError: if ``predictive`` is True and x is not given.
        """
        import xarray as xr

        draws = dict(self.draws)
        if self._is_ppca:
            draws |= {k: v for k, v in self.invariants().items() if k == "canonical_loadings"}
        groups = {"posterior": {name: _variable(name, value) for name, value in draws.items()}}
        if x is not None:
            log_p = self.log_likelihood(x, mask).numpy(force=True)
            groups["log_likelihood"] = {"x": xr.Variable(("chain", "draw", "datum"), log_p)}
        if predictive:
            groups |= self._predictive_groups(x, seed)
        datasets = {name: _dataset(variables) for name, variables in groups.items()}
        return as_installed(xr.DataTree.from_dict(datasets))

    def _predictive_groups(self, x: RowSource | None, seed: int | None) -> dict[str, Any]:
        # A data set for each draw, and the data: variables by group.
        if x is None:
            raise ValueError("predictive=True needs x, whose number of rows is drawn; give x")
        import xarray as xr

        data = as_matrix(x, schema=schema_of(self.model)).double().cpu()
        parameters = self._by_chain("predictive=True")
        loadings, loc = parameters.loadings, parameters.loc.unsqueeze(-2)
        scale = parameters.column_scale.unsqueeze(-2)
        shape = (self.num_chains, self.num_samples, len(data))
        with seeded(seed):
            z = torch.randn(*shape, loadings.shape[-1]).to(loadings)
            noise = torch.randn(*shape, loc.shape[-1]).to(loadings)
        drawn = z @ loadings.mT + loc + scale * noise
        dims = ("chain", "draw", "datum", "column")
        return {
            "posterior_predictive": {"x": xr.Variable(dims, drawn.cpu().numpy())},
            "observed_data": {"x": xr.Variable(dims[2:], data.numpy(force=True))},
        }

    @property
    def _is_ppca(self) -> bool:
        return {"loadings", "loc", "noise_scale"} <= self.draws.keys() and (
            self.model is None or isinstance(self.model, BayesianPPCA)
        )

    def _by_chain(self, purpose: str) -> ParameterDraws:
        if not self._is_ppca:
            raise ValueError(
                f"{purpose} needs the sites of BayesianPPCA (loadings, loc, noise_scale); these "
                f"draws have {sorted(self.draws)}. Use their attribute draws"
            )
        draws = self.draws
        return ParameterDraws(
            draws["loadings"], draws["loc"], draws["noise_scale"], draws.get("relevance")
        )

    def __repr__(self) -> str:
        lines = [
            f"PosteriorSamples: {self.sampler}, {self.num_chains} chains of {self.num_samples} "
            f"draws of {', '.join(self.draws)} given {self.num_data} data points, "
            f"{self.seconds:.1f} s",
            f"  {self.verdict}",
            *(f"  {line}" for line in repr(self._diagnostics).splitlines()),
        ]
        notes = (*self.notes, *self._unidentified())
        return "\n".join([*lines, *(f"  note: {note}" for note in notes)])

    def _unidentified(self) -> Iterator[str]:
        # A note on canonical columns that are left out.
        if not self._is_ppca:
            return
        size = self.draws["loadings"].shape[-1]
        canonical = self.invariants().get("canonical_loadings")
        count = 0 if canonical is None else canonical.shape[-1]
        if count < size:
            yield (
                f"{size - count} of {size} canonical columns of the loadings are left out: their "
                "directions vary over draws, because singular values are close to each other or "
                "to zero"
            )


DIMENSIONS = {
    "loadings": ("column", "latent"),
    "canonical_loadings": ("column", "axis"),
    "loc": ("column",),
    "noise_scale": ("column",),
    "relevance": ("latent",),
}
"""Names of the dimensions of the parameters of probabilistic PCA, for ArviZ."""


def _variable(name: str, value: Float[Tensor, "chains S ..."]) -> Any:
    import xarray as xr

    names = DIMENSIONS.get(name, ())[: value.dim() - 2]
    rest = tuple(f"{name}_dim_{k}" for k in range(len(names), value.dim() - 2))
    return xr.Variable(("chain", "draw", *names, *rest), value.detach().cpu().numpy())


def _dataset(variables: dict[str, Any]) -> Any:
    import xarray as xr

    dataset = xr.Dataset(variables)
    return dataset.assign_coords({dim: np.arange(size) for dim, size in dataset.sizes.items()})
