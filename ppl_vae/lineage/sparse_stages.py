"""The stages of the sparse lineage: one dictionary model, with codes from different methods."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ppl_vae.core.fit_result import FitResult
from ppl_vae.core.state import seeded
from ppl_vae.guides.guides import PerDatumGuide
from ppl_vae.inference.sparse.dictionary import fit_dictionary
from ppl_vae.inference.sparse.map_codes import best_codes
from ppl_vae.likelihoods.gaussian import Gaussian
from ppl_vae.lineage.stage import Stage, StageProblem, SVISettings
from ppl_vae.models.autoencoder import Autoencoder
from ppl_vae.networks.mlp_conv import mlp
from ppl_vae.networks.sparse_layers import LISTA, NormalizedColumns, SoftThreshold

RELATIVE_TOLERANCE = 1e-4
"""The largest slope of the objective at the MAP codes, in units of the penalty."""


@dataclass(frozen=True)
class SparseSettings(SVISettings):
    """Settings of the fits, the same for every stage.

    Attributes:
        steps: maximal number of steps of SVI.
        batch_size: maximal number of rows per step.
        lr: initial learning rate of Adam, which decreases to zero along a cosine.
        hidden: widths of the hidden layers of the MLP encoder.
        unrolled: number of unrolled steps of the LISTA encoder.
        iterations: maximal number of iterations of alternating minimization.
    """

    hidden: tuple[int, ...] = (256,)
    unrolled: int = 3
    iterations: int = 1000


@dataclass(frozen=True, kw_only=True)
class SparseProblem(StageProblem):
    """The data, the model and the settings that every stage is fitted with.

    Attributes:
        train: (N, D), float64.
        latent_dim: K, the number of atoms.
        penalty: lambda, in nats for each unit of |z_k|.
        noise_scale: sigma, in units of x.
        settings: the settings of the fits.
        seed: the seed of initial values and data order.
    """

    penalty: float
    noise_scale: float
    settings: SparseSettings = field(default_factory=SparseSettings)

    def decoder(self) -> nn.Sequential:
        """A decoder with random atoms of length one, the same for every stage."""
        with seeded(self.seed):
            linear = nn.Linear(self.latent_dim, self.train.shape[1])
        return nn.Sequential(NormalizedColumns(linear, "unit"))

    def autoencoder(self, encoder: nn.Module | None = None) -> Autoencoder:
        """The model with this encoder, its bias initialized at the means of x's columns.

        Args:
            encoder: maps x to codes; by default a guide with a free code per datum replaces it.
        """
        guide = None
        if encoder is None:
            guide = PerDatumGuide(len(self.train), self.latent_dim, covariance="delta")
        autoencoder = Autoencoder(
            decoder=self.decoder(),
            data_dim=self.train.shape[1],
            latent_dim=self.latent_dim,
            likelihood=Gaussian(self.noise_scale),
            prior="laplace",
            penalty=self.penalty,
            encoder=encoder,
            guide=guide,
        )
        return autoencoder.to(self.train).center(self.train)

    def map_codes(self, autoencoder: Autoencoder, x: Float[Tensor, "N D"]) -> Any:
        """The MAP codes of rows under the autoencoder's dictionary."""
        return best_codes(autoencoder, x, tolerance=RELATIVE_TOLERANCE * self.penalty)


@dataclass(frozen=True)
class SparseFit:
    """A fitted stage.

    Attributes:
        autoencoder: the fitted model.
        fit: the result of the algorithm; None if nothing was fitted.
    """

    autoencoder: Autoencoder
    fit: FitResult | None


def _random_atoms(problem: SparseProblem) -> SparseFit:
    autoencoder = problem.autoencoder()
    with torch.no_grad():
        autoencoder.guide.loc.copy_(problem.map_codes(autoencoder, problem.train).codes)
    return SparseFit(autoencoder, None)


def _alternating(problem: SparseProblem) -> SparseFit:
    autoencoder = problem.autoencoder()
    iterations = problem.settings.iterations
    fit = fit_dictionary(autoencoder, problem.train, max_iterations=iterations)
    return SparseFit(autoencoder, fit)


def _svi(make: Callable[[SparseProblem], Autoencoder]) -> Callable[[SparseProblem], SparseFit]:
    def run(problem: SparseProblem) -> SparseFit:
        autoencoder = make(problem)
        fit = problem.fit_svi(autoencoder.model, autoencoder.guide, problem.settings)
        return SparseFit(autoencoder, fit)

    return run


def _soft_threshold_encoder(hidden: bool) -> Callable[[SparseProblem], Autoencoder]:
    def make(problem: SparseProblem) -> Autoencoder:
        widths = problem.settings.hidden if hidden else ()
        encoder = mlp(problem.train.shape[1], problem.latent_dim, widths, seed=problem.seed)
        return problem.autoencoder(encoder.append(SoftThreshold(problem.latent_dim)))

    return make


def _lista_encoder(problem: SparseProblem) -> Autoencoder:
    initial: Any = problem.autoencoder().decoder
    threshold = problem.penalty * problem.noise_scale**2
    return problem.autoencoder(LISTA(initial[0], threshold, steps=problem.settings.unrolled))


REFERENCE = "alternating"
MODEL = "dictionary"
_STAGES = (
    Stage("random-atoms", MODEL, "lasso", "none", _random_atoms),
    Stage(REFERENCE, MODEL, "lasso", "alternation", _alternating),
    Stage("per-datum-svi", MODEL, "free z_n", "SVI", _svi(SparseProblem.autoencoder)),
    Stage("linear-encoder", MODEL, "linear", "SVI", _svi(_soft_threshold_encoder(hidden=False))),
    Stage("mlp-encoder", MODEL, "MLP", "SVI", _svi(_soft_threshold_encoder(hidden=True))),
    Stage("unrolled-encoder", MODEL, "LISTA", "SVI", _svi(_lista_encoder)),
)
SPARSE_STAGES: Mapping[str, Stage[SparseFit]] = {stage.name: stage for stage in _STAGES}
