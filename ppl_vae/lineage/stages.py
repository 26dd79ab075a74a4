"""The stages of the lineage: the model, the guide and the algorithm of each."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import pyro.infer

from ppl_vae.core.fit_result import FitResult
from ppl_vae.core.pair import Pair
from ppl_vae.core.program import ProgramLike
from ppl_vae.evaluation.inference_gaps.bound_history import (
    Ascent,
    BoundMonitor,
    em_ascent,
    exact_bound,
)
from ppl_vae.guides.families import num_scale_outputs
from ppl_vae.guides.guides import AmortizedGuide, ExactGuide, GaussianGuide, PerDatumGuide
from ppl_vae.inference.em.fit import fit_closed_form, fit_em, variational_em
from ppl_vae.inference.sparse.pca import fit_pca, implied_gaussian
from ppl_vae.inference.svi.convergence import Convergence
from ppl_vae.likelihoods.gaussian import Gaussian
from ppl_vae.lineage.posterior_stages import (
    PosteriorFit,
    fit_by_sampling,
    fit_variational_bayes,
)
from ppl_vae.lineage.problem import LineageProblem
from ppl_vae.lineage.stage import Stage, own_convergence
from ppl_vae.models.autoencoder import Autoencoder
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.vae import VAE
from ppl_vae.networks.mlp_conv import mlp
from ppl_vae.objectives.bounds import ELBO, IWAE

HIDDEN = (256,)
IWAE_SAMPLES = 8
SCORE_ELBO = ELBO(gradient="score")
"""The ELBO with the score-function gradient, for comparison with the pathwise gradient."""
BAYESIAN = "Bayesian PPCA"
"""The label of the model of stages in which the parameters of PPCA have a posterior."""
POINT = "a point"
"""The label of an autoencoder's q, a point mass, for which there is no bound."""
POINT_FAMILY, NONLINEAR = "delta", ""
"""The family of an autoencoder's q; the family of pairs whose expected loss is unknown."""
NO_PCA = "PCA does not support missing values"
NO_CLOSED_FORM = "with missing values the maximum of the likelihood has no closed form"


@dataclass(frozen=True)
class StageFit:
    """A fitted stage.

    Attributes:
        pair: the model and its guide.
        fit: the result of the algorithm.
        convergence: whether the fit met its tolerance.
        best: a guide known to be optimal within the guide's family for each datum, if there is
            one.
        ascent: bound and log p along the fit, where both are exact.
        bounded: whether the fitted objective is a bound on log p. That of an autoencoder is not:
            its pair is the Gaussian that it implies, with the exact posterior.
    """

    pair: Pair
    fit: FitResult
    convergence: Convergence
    best: ProgramLike | None = None
    ascent: Ascent | None = None
    bounded: bool = True


def _implied(
    fit: Callable[[LineageProblem, Autoencoder], tuple[FitResult, Convergence]],
) -> Callable[[LineageProblem], StageFit]:
    def run(problem: LineageProblem) -> StageFit:
        data_dim = problem.train.shape[1]
        autoencoder = Autoencoder.linear(data_dim, problem.latent_dim, seed=problem.seed)
        autoencoder = autoencoder.to(problem.train)
        result, convergence = fit(problem, autoencoder)
        ppca = implied_gaussian(autoencoder, problem.train).to(problem.train)
        guide = ExactGuide(ppca)
        return StageFit(Pair(ppca.model, guide), result, convergence, best=guide, bounded=False)

    return run


def _pca(problem: LineageProblem, autoencoder: Autoencoder) -> tuple[FitResult, Convergence]:
    fit = fit_pca(autoencoder, problem.train)
    return fit, own_convergence(fit)


def _least_squares(
    problem: LineageProblem, autoencoder: Autoencoder
) -> tuple[FitResult, Convergence]:
    def value() -> float:
        implied = implied_gaussian(autoencoder, problem.train)
        return float(implied.log_likelihood(problem.train).detach().mean())

    lr = problem.settings.linear_lr
    return problem.fit_to_tolerance(autoencoder.model, autoencoder.guide, lr, value)


def _exact(
    fit: Callable[[LineageProblem, PPCA], FitResult], covariance: str = "full"
) -> Callable[[LineageProblem], StageFit]:
    def run(problem: LineageProblem) -> StageFit:
        ppca = problem.initial_ppca()
        result = fit(problem, ppca)
        guide = ExactGuide(ppca, covariance=covariance)
        ascent = em_ascent(result) if len(result.objective) == 2 * result.steps else None
        convergence = own_convergence(result)
        return StageFit(Pair(ppca.model, guide), result, convergence, best=guide, ascent=ascent)

    return run


def _svi(
    make_guide: Callable[[LineageProblem, PPCA], GaussianGuide],
    covariance: str,
    *,
    hidden: bool = False,
) -> Callable[[LineageProblem], StageFit]:
    def run(problem: LineageProblem) -> StageFit:
        ppca = problem.initial_ppca()
        guide = make_guide(problem, ppca)
        monitor = BoundMonitor(ppca, guide, problem.train)
        monitor(0, 0.0)
        settings = problem.settings
        lr = settings.encoder_lr if hidden else settings.linear_lr

        def value() -> float:
            return float(exact_bound(ppca, guide, problem.train)[0])

        fit, convergence = problem.fit_to_tolerance(ppca.model, guide, lr, value, monitor)
        best = ExactGuide(ppca, covariance=covariance)
        ascent = monitor.ascent()
        return StageFit(Pair(ppca.model, guide), fit, convergence, best=best, ascent=ascent)

    return run


def _per_datum_guide(problem: LineageProblem, ppca: PPCA) -> PerDatumGuide:
    return PerDatumGuide(len(problem.train), problem.latent_dim).to(problem.train)


def _exact_guide(problem: LineageProblem, ppca: PPCA) -> ExactGuide:
    return ExactGuide(ppca)


def _linear_encoder(covariance: str) -> Callable[[LineageProblem, PPCA], AmortizedGuide]:
    def make(problem: LineageProblem, ppca: PPCA) -> AmortizedGuide:
        k = problem.latent_dim
        encoder = mlp(ppca.data_dim, k, seed=problem.seed)
        guide = AmortizedGuide(encoder, k, covariance=covariance, homoscedastic=True)
        return guide.to(problem.train.device)

    return make


def _deep_encoder(problem: LineageProblem, ppca: PPCA) -> AmortizedGuide:
    k = problem.latent_dim
    # relu(y) - relu(-y) = y: with 2 K hidden units it can represent the linear posterior mean.
    hidden = (max(HIDDEN[0], 2 * k),)
    num_outputs = k + num_scale_outputs("diagonal", k)
    encoder = mlp(ppca.data_dim, num_outputs, hidden, seed=problem.seed)
    return AmortizedGuide(encoder, k).to(problem.train)


def _vae(objective: pyro.infer.ELBO | None) -> Callable[[LineageProblem], StageFit]:
    def run(problem: LineageProblem) -> StageFit:
        vae = VAE.mlp(
            problem.train.shape[1],
            problem.latent_dim,
            hidden=HIDDEN,
            activation="gelu",
            # The average variance of x is one: noise of one half leaves some to the latents.
            likelihood=Gaussian("shared", initial=0.5**0.5),
            seed=problem.seed,
        )
        fit = problem.fit_early_stopping(vae.model, vae.guide, objective)
        return StageFit(Pair(vae.model, vae.guide), *fit)

    return run


def _closed_form(problem: LineageProblem, ppca: PPCA) -> FitResult:
    return fit_closed_form(ppca, problem.train)


def _em(problem: LineageProblem, ppca: PPCA, *, accelerate: bool) -> FitResult:
    return fit_em(ppca, problem.train, accelerate=accelerate, starts=problem.settings.starts)


def _variational_em(problem: LineageProblem, ppca: PPCA) -> FitResult:
    return variational_em(ppca, problem.train, starts=problem.settings.starts)


_STAGES = (
    Stage("pca", "PPCA", POINT, "eigenvectors", _implied(_pca), POINT_FAMILY, NO_PCA),
    Stage(
        "linear-autoencoder", "PPCA", POINT, "SVI, MSE", _implied(_least_squares), POINT_FAMILY
    ),
    Stage(
        "closed-form", "PPCA", "exact", "closed form", _exact(_closed_form), "full",
        NO_CLOSED_FORM,
    ),
    Stage("em", "PPCA", "exact", "EM", _exact(partial(_em, accelerate=False)), "full"),
    Stage("px-em", "PPCA", "exact", "PX-EM", _exact(partial(_em, accelerate=True)), "full"),
    Stage(
        "variational-em", "PPCA", "q_i, diag", "variational EM",
        _exact(_variational_em, "diagonal"), "diagonal",
    ),
    Stage(
        "per-datum-svi", "PPCA", "q_i, diag", "SVI", _svi(_per_datum_guide, "diagonal"), "diagonal"
    ),
    Stage("exact-svi", "PPCA", "exact", "SVI", _svi(_exact_guide, "full"), "full"),
    Stage(
        "linear-amortized", "PPCA", "linear, diag", "SVI",
        _svi(_linear_encoder("diagonal"), "diagonal"), "diagonal",
    ),
    Stage(
        "deep-amortized", "PPCA", "MLP, diag", "SVI",
        _svi(_deep_encoder, "diagonal", hidden=True), "diagonal",
    ),
    Stage(
        "isotropic-q", "PPCA", "linear, v I", "SVI",
        _svi(_linear_encoder("isotropic"), "isotropic"), "isotropic",
    ),
    Stage("unit-q", "PPCA", "linear, I", "SVI", _svi(_linear_encoder("unit"), "unit"), "unit"),
    Stage("vae", "MLP", "MLP, diag", "SVI", _vae(None)),
    Stage("iwae", "MLP", "MLP, diag", f"SVI, S={IWAE_SAMPLES}", _vae(IWAE(IWAE_SAMPLES))),
    Stage("score-vae", "MLP", "MLP, diag", "SVI, score", _vae(SCORE_ELBO)),
    Stage(
        "variational-bayes", BAYESIAN, "mean field", "VB, ARD prior", fit_variational_bayes
    ),
    Stage("posterior", BAYESIAN, "exact", "Gibbs", fit_by_sampling("gibbs")),
    Stage("nuts", BAYESIAN, "exact", "NUTS", fit_by_sampling("nuts"), on_request=True),
)  # fmt: skip
STAGES: Mapping[str, Stage[StageFit | PosteriorFit]] = {stage.name: stage for stage in _STAGES}


def skipped_stages(names: Iterable[str], has_missing: bool) -> dict[str, str]:
    """The stages among these that are skipped for data with missing values, with the reason."""
    if not has_missing:
        return {}
    chosen = (STAGES[name] for name in names if name in STAGES)
    return {stage.name: stage.needs_complete for stage in chosen if stage.needs_complete}
