"""The result of variational Bayes."""

from dataclasses import dataclass, field
from typing import Any, cast

import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppl_vae.core.fit_result import FitResult
from ppl_vae.core.results import UNSAVED
from ppl_vae.inference.variational_bayes.parameters import ConjugateUpdates, ParameterPosterior
from ppl_vae.models.bayesian_ppca import BayesianPPCA
from ppl_vae.models.variational_posterior import VBPosterior

MIN_ACTIVE_SHARE = 0.1
"""A column of W is switched off if its posterior mean has a smaller share of E w^2."""


@dataclass(frozen=True, repr=False, kw_only=True)
class VBResult(FitResult):
    """The result of :func:`~ppl_vae.inference.variational_bayes.fit.fit_vb`.

    ``objective`` is the bound of log p(x) / N after each iteration, in nats per datum.

    Attributes:
        guide: the posterior, as a guide for ``model.model``; None in a result that
            ``from_dict`` returns.
        num_data: N.
        loadings, loadings_sd: posterior mean and standard deviation of W, (D, K).
        loc, loc_sd: the mean and the standard deviation of mu, (D,).
        noise_scale, noise_scale_sd: the mean and the standard deviation of sigma, () or (D,).
        relevance, relevance_sd: the mean and the standard deviation of the relevances, (K,); None
            without ARD.
        active_share: for each column of W, the share of sum_d E w_dk^2 / s_d^2 that the posterior
            mean has, (K,).
        active: whether this share is at least 10 %, (K,). If not, the column is switched off: its
            mean approaches zero, and z_k has its prior as its posterior.
    """

    guide: VBPosterior = field(default=cast(Any, None), compare=False, metadata=UNSAVED)
    num_data: int
    loadings: Float[Tensor, "D K"]
    loadings_sd: Float[Tensor, "D K"]
    loc: Float[Tensor, " D"]
    loc_sd: Float[Tensor, " D"]
    noise_scale: Float[Tensor, "*D"]
    noise_scale_sd: Float[Tensor, "*D"]
    relevance: Float[Tensor, " K"] | None
    relevance_sd: Float[Tensor, " K"] | None
    active_share: Float[Tensor, " K"]
    active: Bool[Tensor, " K"]

    @property
    def bound(self) -> float:
        """The lower bound of the log evidence, log p(x) of the whole table, in nats."""
        return float(self.objective[-1]) * self.num_data

    def __repr__(self) -> str:
        lines = [
            f"{self.algorithm}: {self.steps} iterations in {self.seconds:.2f} s, {self.stopped}",
            f"  log evidence >= {self.bound:.2f} nats "
            f"({float(self.objective[-1]):.4f} nats per datum)",
            f"  {int(self.active.sum())} of {len(self.active)} columns of W are active",
        ]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def active_share(posterior: ParameterPosterior, updates: ConjugateUpdates) -> Float[Tensor, " K"]:
    """For each column of W, the share of sum_d E w_dk^2 / s_d^2 that the posterior mean has."""
    scaled = posterior.mean[:, :-1] / updates.priors.loadings_scale[:, None]
    return scaled.square().sum(0) / updates.scaled_squares(posterior).diagonal()


def guide_of(
    model: BayesianPPCA, posterior: ParameterPosterior, centre: Float[Tensor, " D"]
) -> VBPosterior:
    """A posterior relative to ``centre`` as a guide, in the dtype and on the device of a model."""
    guide = VBPosterior(model).to(next(model.loc_prior.buffers()))
    guide.schema = model.schema
    shift = torch.nn.functional.pad(centre[:, None], (posterior.mean.shape[1] - 1, 0))
    return guide.assign(
        row_mean=posterior.mean + shift,
        row_tril=posterior.tril,
        noise=posterior.noise,
        relevance=posterior.relevance,
    )


def scale_moments(noise: dist.Gamma) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of sigma, given the distribution of sigma^-2.

    With sigma^-2 ~ Gamma(a, b), E sigma = b^1/2 Gamma(a - 1/2) / Gamma(a) and
    E sigma^2 = b / (a - 1). They are infinite if a is too small.
    """
    a, b = noise.concentration, noise.rate
    mean = torch.where(a > 0.5, b.sqrt() * ((a - 0.5).lgamma() - a.lgamma()).exp(), torch.inf)
    variance = torch.where(a > 1, b / (a - 1) - mean.square(), torch.inf)
    return mean, variance.sqrt()
