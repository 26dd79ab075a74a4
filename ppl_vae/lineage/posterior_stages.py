"""The Bayesian stages of the lineage: PPCA whose parameters have priors, and their posterior.

The priors are the defaults of :class:`~ppl_vae.models.bayesian_ppca.BayesianPPCA`. They are weakly
informative in the units of the fits, in which columns have mean zero and variance one on average.
Variational Bayes has the ARD prior, which switches off columns of W that the data do not need;
samplers have the normal prior, under which chains mix within a few iterations.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from pyro import poutine

from ppl_vae.core.fit_result import FitResult
from ppl_vae.core.state import seeded
from ppl_vae.data.units import Units
from ppl_vae.inference.mcmc.invariants import mean_parameters
from ppl_vae.inference.mcmc.samples import PosteriorSamples
from ppl_vae.inference.mcmc.sampling import sample_posterior
from ppl_vae.inference.svi.convergence import Convergence
from ppl_vae.inference.variational_bayes.fit import fit_vb
from ppl_vae.lineage.problem import LineageProblem
from ppl_vae.lineage.stage import own_convergence
from ppl_vae.models.bayesian_ppca import BayesianPPCA, ParameterDraws
from ppl_vae.models.ppca import PPCA

NUM_CHAINS = 4
NUM_PRIOR_DRAWS = 200


@dataclass(frozen=True)
class PosteriorFit:
    """A fitted Bayesian stage.

    Attributes:
        fit: the result of the algorithm.
        convergence: whether the fit met its tolerance, or the draws can be trusted.
        samples: draws of the parameters, in the units of the fit.
        mean: PPCA at the posterior mean of the parameters, of W up to a rotation.
        bounded: whether the objective is a bound on the log evidence, per datum.
        num_active: the number of columns of W that are not switched off, where it is decided.
        diagnosis: whether the draws can be trusted; empty for independent ones.
    """

    fit: FitResult
    convergence: Convergence
    samples: PosteriorSamples
    mean: PPCA
    bounded: bool = False
    num_active: int | None = None
    diagnosis: str = ""


def _bayesian_ppca(problem: LineageProblem, prior: str = "normal") -> BayesianPPCA:
    model = BayesianPPCA(problem.train.shape[1], problem.latent_dim, prior=prior)
    return model.to(problem.train)


def fit_variational_bayes(problem: LineageProblem) -> PosteriorFit:
    """Variational Bayes, with independent draws from its posterior."""
    model = _bayesian_ppca(problem, "ard")
    found = fit_vb(model, problem.train, seed=problem.seed)
    number = NUM_CHAINS * problem.settings.posterior_draws
    draws = found.guide.draw_parameters(number, seed=problem.seed)
    samples = PosteriorSamples(
        draws={name: value[None].double() for name, value in draws.sites().items()},
        sampler=found.algorithm,
        seconds=found.seconds,
        num_data=found.num_data,
        model=model,
    )
    fit = FitResult(**{field.name: getattr(found, field.name) for field in fields(FitResult)})
    return PosteriorFit(
        fit,
        own_convergence(fit),
        samples,
        model.ppca(ParameterDraws(found.loadings, found.loc, found.noise_scale, None)),
        bounded=True,
        num_active=int(found.active.sum()),
    )


def fit_by_sampling(sampler: str) -> Callable[[LineageProblem], PosteriorFit]:
    """The stage that draws from the posterior with this sampler."""

    def run(problem: LineageProblem) -> PosteriorFit:
        model, number = _bayesian_ppca(problem), problem.settings.posterior_draws
        warmup = max(number // 2, 1)
        samples = sample_posterior(
            model,
            problem.train,
            num_samples=number,
            warmup=warmup,
            chains=NUM_CHAINS,
            sampler=sampler,
            seed=problem.seed,
            progress=False,
        )
        steps, verdict = number + warmup, samples.verdict
        fit = FitResult(
            algorithm=samples.sampler,
            objective=torch.full((1,), math.nan),  # nothing is maximised
            elapsed=torch.tensor([samples.seconds]),
            steps=steps,
            seconds=samples.seconds,
            stopped=f"after {steps} iterations of {NUM_CHAINS} chains",
            notes=samples.notes,
        )
        met = verdict.startswith("reliable")
        convergence = Convergence(met, math.nan, math.nan, steps, verdict)
        mean = model.ppca(mean_parameters(samples.parameters()))
        return PosteriorFit(fit, convergence, samples, mean, diagnosis=verdict)

    return run


def in_data_units(samples: PosteriorSamples, units: Units) -> PosteriorSamples:
    """Draws of the parameters for data in their own units."""
    sites = _in_data_units(ParameterDraws(**{"relevance": None, **samples.draws}), units).sites()
    return replace(samples, draws=sites, model=None)


def prior_draws(problem: LineageProblem, units: Units) -> ParameterDraws:
    """Draws from the prior of the samplers' model, (R, ...), in the data's units."""
    model = _bayesian_ppca(problem)
    with torch.no_grad(), seeded(problem.seed), poutine.block():
        draws = [model.sample_parameters() for _ in range(NUM_PRIOR_DRAWS)]
    loadings, loc, noise_scale = (
        torch.stack([getattr(draw, name) for draw in draws])
        for name in ("loadings", "loc", "noise_scale")
    )
    return _in_data_units(ParameterDraws(loadings, loc, noise_scale, None), units)


def _in_data_units(parameters: ParameterDraws, units: Units) -> ParameterDraws:
    # Columns with scales of their own have noise scales of their own. Relevances have no unit.
    loadings, loc, noise_scale, relevance = parameters
    scale = units.scale.to(loc)
    wide = noise_scale.unsqueeze(-1) if units.per_column else noise_scale
    return ParameterDraws(
        loadings * scale.reshape(-1, 1), loc * scale + units.loc.to(loc), wide * scale, relevance
    )
