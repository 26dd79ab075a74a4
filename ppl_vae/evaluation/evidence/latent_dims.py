"""The comparison of numbers of latent dimensions: evidence, bounds, criteria and p(K | x)."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ppl_vae.core.arrays.schema import TableSchema
from ppl_vae.core.state import seeded
from ppl_vae.core.stats import mean_and_error
from ppl_vae.core.validation import (
    ArrayLike,
    as_matrix,
    check_int,
    observed_mask,
    without_empty_rows,
)
from ppl_vae.evaluation.evidence.bridge_sampling import LogEvidence, bridge_sampling
from ppl_vae.evaluation.evidence.laplace import (
    bic_log_evidence,
    laplace_log_evidence,
    minka_log_evidence,
    number_of_parameters,
)
from ppl_vae.evaluation.evidence.latent_dims_result import (
    APPROXIMATIONS,
    LatentDims,
    posterior_probabilities,
)
from ppl_vae.evaluation.evidence.log_evidence import evidence_coordinates, positions
from ppl_vae.evaluation.evidence.loo import MAX_TAIL_INDEX, leave_one_out
from ppl_vae.inference.em.fit import fit_closed_form, fit_em
from ppl_vae.inference.mcmc.samples import PosteriorSamples
from ppl_vae.inference.mcmc.sampling import sample_posterior
from ppl_vae.inference.variational_bayes.fit import fit_vb
from ppl_vae.models.bayesian_ppca import BayesianPPCA
from ppl_vae.models.linear.sufficient_statistics import SampleCovariance
from ppl_vae.models.linear.table_statistics import TableStatistics
from ppl_vae.models.ppca import PPCA

MAX_LEFT_OUT = 2000
"""The largest number of data that are left out in turn."""
MAX_UNRELIABLE = 0.1
"""A note is made if a larger share of the leave-one-out estimates is unreliable."""


def compare_latent_dims(
    x: ArrayLike,
    dims: Iterable[int],
    *,
    noise: str = "isotropic",
    mask: ArrayLike | None = None,
    make_model: Callable[[int], BayesianPPCA] | None = None,
    x_test: ArrayLike | None = None,
    num_samples: int = 1000,
    warmup: int = 500,
    chains: int = 4,
    seed: int | None = None,
) -> LatentDims:
    """Compare numbers of latent dimensions K of Bayesian PPCA by their evidence.

    For each K the posterior is drawn by :func:`~ppl_vae.inference.mcmc.sampling.sample_posterior`
    and log p(x | K) computed from the draws by bridge sampling. Its relation to K depends on the
    priors, those of :meth:`~ppl_vae.models.bayesian_ppca.BayesianPPCA.like` by default.

    Args:
        x: (N, D); NaN marks a missing value.
        dims: the values of K, each at least 1 and less than the rank of the centred data.
        noise: ``"isotropic"`` or ``"diagonal"``.
        mask: True where observed.
        make_model: returns the model for a K, in place of ``BayesianPPCA.like``. Its prior on the
            loadings must be normal: relevances (ARD) choose K within one model.
        x_test: held-out rows; without them, held-out log p is estimated by leaving out each datum
            in turn (for at most 2,000 data drawn at random).
        num_samples: draws of each chain.
        warmup: sweeps of each chain before its first draw.
        chains: the number of chains.
        seed: the seed of everything that is drawn.

    Raises:
        ValueError: if dims is empty, repeats a value, or has a K that x does not allow; if a model
            has ``prior="ard"`` or another number of dimensions.
    """
    values = _check_dims(dims)
    make = make_model or partial(_default_model, x, noise=noise, mask=mask)
    table = ComparisonData(x, mask, x_test, num_samples, warmup, chains, seed)
    found = [_compare_one(table, _check_model(make(k), k)) for k in values]
    log_evidence = torch.tensor([one.evidence.value for one in found], dtype=torch.float64)
    error = torch.tensor([one.evidence.standard_error for one in found], dtype=torch.float64)
    probability, probability_error = posterior_probabilities(log_evidence, error)
    *columns, held_out, held_out_error = _columns([one.criteria for one in found])
    return LatentDims(
        dims=values,
        log_evidence=log_evidence,
        evidence_error=error,
        approximations=dict(zip(APPROXIMATIONS, columns, strict=True)),
        held_out=held_out,
        held_out_error=held_out_error,
        probability=probability,
        probability_error=probability_error,
        num_data=table.statistics.num_data,
        notes=tuple(dict.fromkeys(note for one in found for note in one.notes)),
        samples=tuple(one.samples for one in found),
    )


class ComparisonData:
    """The data of a comparison and the settings of the sampler."""

    def __init__(
        self,
        x: ArrayLike,
        mask: ArrayLike | None,
        x_test: ArrayLike | None,
        num_samples: int,
        warmup: int,
        chains: int,
        seed: int | None,
    ) -> None:
        self.x = without_empty_rows(as_matrix(x, mask=mask).double())
        self.mask = observed_mask(self.x)
        if x_test is not None:
            x_test = as_matrix(x_test, name="x_test", schema=TableSchema.of(x))
            x_test = without_empty_rows(x_test)
        self.x_test, self.seed = x_test, seed
        self.statistics = TableStatistics.of(self.x, self.mask)
        self.num_samples, self.warmup, self.chains = num_samples, warmup, chains

    def sample(self, model: BayesianPPCA) -> PosteriorSamples:
        """Draws of the posterior."""
        return sample_posterior(
            model,
            self.x,
            mask=self.mask,
            num_samples=self.num_samples,
            warmup=self.warmup,
            chains=self.chains,
            seed=self.seed,
            progress=False,
        )

    def minka(self, noise: str, latent_dim: int) -> float:
        """Minka's approximation, or NaN where it is not defined."""
        if self.mask is not None or noise != "isotropic":
            return math.nan
        values, _ = SampleCovariance.of(self.x).eigh()
        full = values.new_zeros(self.x.shape[1])
        full[: len(values)] = values
        return float(minka_log_evidence(full, len(self.x))[latent_dim - 1])

    @torch.no_grad()
    def maximal_log_likelihood(self, noise: str, latent_dim: int) -> float:
        """log p of all data at the maximum-likelihood parameters, in nats."""
        ppca = PPCA.like(self.x, latent_dim, noise=noise, mask=self.mask, seed=self.seed)
        if self.mask is None and noise == "isotropic":
            fit_closed_form(ppca, self.x)
        else:
            fit_em(ppca, self.x, mask=self.mask)
        return float(ppca.log_likelihood(self.x, mask=self.mask).sum())

    def left_out(self) -> tuple[Tensor, Tensor | None]:
        """The rows that are left out in turn."""
        if len(self.x) <= MAX_LEFT_OUT:
            return self.x, self.mask
        with seeded(self.seed):
            rows = torch.randperm(len(self.x))[:MAX_LEFT_OUT]
        return self.x[rows], None if self.mask is None else self.mask[rows]


@dataclass(frozen=True)
class OneDim:
    """What is computed for one K; ``criteria`` are in the order of :class:`LatentDims`."""

    evidence: LogEvidence
    criteria: tuple[float, ...]
    samples: PosteriorSamples
    notes: tuple[str, ...]


def _compare_one(table: ComparisonData, model: BayesianPPCA) -> OneDim:
    latent_dim, noise, num_data = model.latent_dim, model.noise, table.statistics.num_data
    posterior = evidence_coordinates(model, table.statistics)
    samples = table.sample(model)
    draws = positions(posterior, samples)
    evidence = bridge_sampling(posterior.log_density, draws, seed=table.seed)
    held_out, held_out_error, notes = _held_out(table, samples, latent_dim)
    best = table.maximal_log_likelihood(noise, latent_dim)
    number = number_of_parameters(model.data_dim, latent_dim, noise)
    criteria = (
        fit_vb(model, table.statistics, seed=table.seed).bound,
        laplace_log_evidence(posterior.log_density, draws.flatten(0, 1).mean(0)),
        table.minka(noise, latent_dim),
        bic_log_evidence(best, number, num_data),
        held_out,
        held_out_error,
    )
    if not evidence.reliable:
        notes += (f"K = {latent_dim}: {str(evidence).splitlines()[-1].strip()}",)
    if not samples.verdict.startswith("reliable"):
        notes += (f"K = {latent_dim}: {samples.verdict}",)
    return OneDim(evidence, criteria, samples, notes)


def _held_out(
    table: ComparisonData, samples: PosteriorSamples, latent_dim: int
) -> tuple[float, float, tuple[str, ...]]:
    # The mean of held-out log p over data, its standard error, and caveats.
    if table.x_test is not None:
        values = samples.log_predictive(table.x_test).value
        return *mean_and_error(values), ()
    log_likelihood = samples.log_likelihood(*table.left_out()).flatten(0, 1)
    values, k_hat = leave_one_out(log_likelihood)
    unreliable = float((k_hat > MAX_TAIL_INDEX).double().mean())
    notes: tuple[str, ...] = ()
    if unreliable > MAX_UNRELIABLE:
        notes = (
            f"K = {latent_dim}: held-out log p is unreliable because {unreliable:.0%} of the data "
            f"have a tail index above {MAX_TAIL_INDEX} when left out; pass x_test",
        )
    return *mean_and_error(values), notes


def _columns(rows: list[tuple[float, ...]]) -> list[Tensor]:
    return list(torch.tensor(rows, dtype=torch.float64).unbind(1))


def _default_model(
    x: ArrayLike, latent_dim: int, *, noise: str, mask: ArrayLike | None
) -> BayesianPPCA:
    return BayesianPPCA.like(x, latent_dim, noise=noise, mask=mask).double()


def _check_model(model: BayesianPPCA, latent_dim: int) -> BayesianPPCA:
    if not isinstance(model, BayesianPPCA) or model.latent_dim != latent_dim:
        raise ValueError(
            f"make_model({latent_dim}) must return a BayesianPPCA with latent_dim={latent_dim}; "
            f"it returned {model!r}"
        )
    return model


def _check_dims(dims: Iterable[int]) -> tuple[int, ...]:
    values = tuple(check_int("dims", value) for value in dims)
    if not values or len(set(values)) < len(values):
        raise ValueError(f"dims must be distinct values of K, at least one; got {list(values)}")
    return values
