"""The stages of the lineage: which model, which guide, which algorithm."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro.infer
from torch import Tensor

from ppl_vae.core.program import ProgramLike
from ppl_vae.core.results import FitResult
from ppl_vae.evaluation.inference_gaps.ascent import Ascent, BoundMonitor, em_ascent, exact_bound
from ppl_vae.guides.families import num_scale_outputs
from ppl_vae.guides.guides import AmortizedGuide, ExactGuide, PerDatumGuide
from ppl_vae.inference.em.fit import fit_closed_form, fit_em, variational_em
from ppl_vae.inference.sparse.pca import fit_pca, implied_gaussian
from ppl_vae.inference.svi.convergence import Convergence
from ppl_vae.likelihoods.gaussian import Gaussian
from ppl_vae.lineage.problem import Task
from ppl_vae.models.autoencoder import Autoencoder
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.vae import VAE
from ppl_vae.networks.mlp_conv import mlp
from ppl_vae.objectives.bounds import ELBO, IWAE

HIDDEN = (256,)
IWAE_SAMPLES = 8
SCORE = ELBO(gradient="score")
"""The same ELBO by its score: what gradients through the draws are worth."""
POINT = "a point"
"""The q of an autoencoder, which makes no bound."""
POINT_FAMILY, NONLINEAR = "delta", ""
"""The family of an autoencoder's q; that of pairs in which no price is known."""
NO_PCA = "PCA has no place for missing values"
NO_CLOSED_FORM = "with missing values the likelihood has no maximum in closed form"


@dataclass(frozen=True)
class Fitted:
    """A stage after its fit.

    Attributes:
        model, guide: the pair.
        fit: how it went.
        convergence: whether it went on until its tolerance was met.
        best: a guide known to be the best of the guide's family for each datum, if there is one.
        ascent: bound and log p as they rose, where both are exact.
        bounded: whether what was fitted has a bound on log p. An autoencoder has none: its pair
            is the Gaussian it implies, with the exact posterior.
    """

    model: ProgramLike
    guide: ProgramLike
    fit: FitResult
    convergence: Convergence
    best: ProgramLike | None = None
    ascent: Ascent | None = None
    bounded: bool = True


@dataclass(frozen=True)
class Stage:
    """A row of the lineage's table.

    Attributes:
        name: by which it is asked for.
        model, q, algorithm: what the table says.
        climb: fits it.
        family: of q, if the model is PPCA, see :mod:`ppl_vae.guides.families`: what its price is
            known by.
        complete: why it needs data without missing values; empty if it does not.
    """

    name: str
    model: str
    q: str
    algorithm: str
    run: Callable[[Task], Fitted]
    family: str = NONLINEAR
    complete: str = ""


def _implied(
    fit: Callable[[Task, Autoencoder], tuple[FitResult, Convergence]],
) -> Callable[[Task], Fitted]:
    def run(task: Task) -> Fitted:
        made = Autoencoder.linear(task.train.shape[1], task.latent_dim, seed=task.seed)
        autoencoder = made.to(task.train)
        result, convergence = fit(task, autoencoder)
        ppca = implied_gaussian(autoencoder, task.train).to(task.train)
        guide = ExactGuide(ppca)
        return Fitted(ppca.model, guide, result, convergence, best=guide, bounded=False)

    return run


def _by_itself(fit: FitResult) -> Convergence:
    """Of a closed form, or of EM, which has a tolerance of its own."""
    return Convergence(fit.converged is not False, math.nan, math.nan, fit.steps, fit.stopped)


def _pca(task: Task, autoencoder: Autoencoder) -> tuple[FitResult, Convergence]:
    fit = fit_pca(autoencoder, task.train)
    return fit, _by_itself(fit)


def _squares(task: Task, autoencoder: Autoencoder) -> tuple[FitResult, Convergence]:
    def value() -> float:
        implied = implied_gaussian(autoencoder, task.train)
        return float(implied.log_likelihood(task.train).detach().mean())

    lr = task.settings.linear_lr
    return task.to_tolerance(autoencoder.model, autoencoder.guide, lr, value)


def _exact(fit: Callable[[PPCA, Tensor], FitResult], covariance: str = "full") -> Any:
    def run(task: Task) -> Fitted:
        ppca = task.ppca()
        result = fit(ppca, task.train)
        guide = ExactGuide(ppca, covariance=covariance)
        ascent = em_ascent(result) if len(result.objective) == 2 * result.steps else None
        convergence = _by_itself(result)
        return Fitted(ppca.model, guide, result, convergence, best=guide, ascent=ascent)

    return run


def _svi(
    make_guide: Callable[[Task, PPCA], Any], covariance: str, *, hidden: bool = False
) -> Callable[[Task], Fitted]:
    def run(task: Task) -> Fitted:
        ppca = task.ppca()
        guide = make_guide(task, ppca)
        recording = BoundMonitor(ppca, guide, task.train)
        recording(0, 0.0)
        lr = task.settings.encoder_lr if hidden else task.settings.linear_lr

        def value() -> float:
            return float(exact_bound(ppca, guide, task.train)[0])

        fit, convergence = task.to_tolerance(ppca.model, guide, lr, value, recording)
        best = ExactGuide(ppca, covariance=covariance)
        ascent = recording.ascent()
        return Fitted(ppca.model, guide, fit, convergence, best=best, ascent=ascent)

    return run


def _per_datum(task: Task, ppca: PPCA) -> PerDatumGuide:
    return PerDatumGuide(len(task.train), task.latent_dim).to(task.train)


def _exact_guide(task: Task, ppca: PPCA) -> ExactGuide:
    return ExactGuide(ppca)


def _linear(covariance: str) -> Callable[[Task, PPCA], AmortizedGuide]:
    def make(task: Task, ppca: PPCA) -> AmortizedGuide:
        encoder = mlp(ppca.data_dim, task.latent_dim, seed=task.seed)
        shape = {"covariance": covariance, "homoscedastic": True}
        return AmortizedGuide(encoder, task.latent_dim, **shape)

    return make


def _deep(task: Task, ppca: PPCA) -> AmortizedGuide:
    k = task.latent_dim
    # relu(y) - relu(-y) = y: with 2 K hidden units it can be the linear posterior mean.
    hidden = (max(HIDDEN[0], 2 * k),)
    encoder = mlp(ppca.data_dim, k + num_scale_outputs("diagonal", k), hidden, seed=task.seed)
    return AmortizedGuide(encoder, k).to(task.train)


def _vae(objective: pyro.infer.ELBO | None) -> Callable[[Task], Fitted]:
    def run(task: Task) -> Fitted:
        # With average variance one, noise of a half leaves the latents something to explain.
        likelihood = Gaussian("shared", initial=0.5**0.5)
        shape = {"hidden": HIDDEN, "activation": "gelu", "likelihood": likelihood}
        vae = VAE.mlp(task.train.shape[1], task.latent_dim, seed=task.seed, **shape)
        return Fitted(vae.model, vae.guide, *task.stopped_early(vae.model, vae.guide, objective))

    return run


_plain_em = partial(fit_em, accelerate=False)
_STAGES = (
    Stage("pca", "PPCA", POINT, "eigenvectors", _implied(_pca), POINT_FAMILY, NO_PCA),
    Stage(
        "linear-autoencoder", "PPCA", POINT, "SVI, squares", _implied(_squares), POINT_FAMILY
    ),
    Stage(
        "closed-form", "PPCA", "exact", "closed form", _exact(fit_closed_form), "full",
        NO_CLOSED_FORM,
    ),
    Stage("em", "PPCA", "exact", "EM", _exact(_plain_em), "full"),
    Stage("px-em", "PPCA", "exact", "PX-EM", _exact(fit_em), "full"),
    Stage(
        "variational-em", "PPCA", "q_i, diag", "rotating VEM",
        _exact(variational_em, "diagonal"), "diagonal",
    ),
    Stage(
        "per-datum-svi", "PPCA", "q_i, diag", "SVI", _svi(_per_datum, "diagonal"), "diagonal"
    ),
    Stage("exact-svi", "PPCA", "exact", "SVI", _svi(_exact_guide, "full"), "full"),
    Stage(
        "linear-amortized", "PPCA", "linear, diag", "SVI",
        _svi(_linear("diagonal"), "diagonal"), "diagonal",
    ),
    Stage(
        "deep-amortized", "PPCA", "MLP, diag", "SVI",
        _svi(_deep, "diagonal", hidden=True), "diagonal",
    ),
    Stage(
        "isotropic-q", "PPCA", "linear, v I", "SVI",
        _svi(_linear("isotropic"), "isotropic"), "isotropic",
    ),
    Stage("unit-q", "PPCA", "linear, I", "SVI", _svi(_linear("unit"), "unit"), "unit"),
    Stage("vae", "MLP", "MLP, diag", "SVI", _vae(None)),
    Stage("iwae", "MLP", "MLP, diag", f"SVI, S={IWAE_SAMPLES}", _vae(IWAE(IWAE_SAMPLES))),
    Stage("score-vae", "MLP", "MLP, diag", "SVI, score", _vae(SCORE)),
)  # fmt: skip
STAGES: Mapping[str, Stage] = {stage.name: stage for stage in _STAGES}


def left_out(names: Iterable[str], holes: bool) -> dict[str, str]:
    """Which of these stages data with missing values, or without, leave out, and why."""
    known = (STAGES[name] for name in names if holes and name in STAGES)
    return {stage.name: stage.complete for stage in known if stage.complete}
