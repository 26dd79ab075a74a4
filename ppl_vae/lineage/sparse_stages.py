"""The stages of the lineage of sparse codes: one dictionary model, and who finds its codes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ppl_vae.core.results import FitResult
from ppl_vae.core.state import seeded
from ppl_vae.guides.guides import PerDatumGuide
from ppl_vae.inference.sparse.dictionary import fit_dictionary
from ppl_vae.inference.sparse.map_codes import best_codes
from ppl_vae.inference.svi.fit import fit_svi
from ppl_vae.likelihoods.gaussian import Gaussian
from ppl_vae.models.autoencoder import Autoencoder
from ppl_vae.networks.mlp_conv import mlp
from ppl_vae.networks.sparse_layers import LISTA, NormalizedColumns, SoftThreshold

TOLERANCE = 1e-4
"""The slope that is left at the best codes, in units of the penalty."""


@dataclass(frozen=True)
class SparseSettings:
    """How the stages are fitted: every one by SVI in the same way.

    Attributes:
        steps: of SVI.
        batch_size: at most.
        lr: of Adam, falling to zero along a cosine.
        hidden: widths of the hidden layers of the MLP encoder.
        unrolled: steps of the unrolled encoder.
        iterations: of the alternation, at most.
    """

    steps: int = 1500
    batch_size: int = 256
    lr: float = 1e-2
    hidden: tuple[int, ...] = (256,)
    unrolled: int = 3
    iterations: int = 1000


@dataclass(frozen=True)
class SparseTask:
    """What all stages are fitted to, and where all of them start.

    Attributes:
        train: (N, D), float64.
        latent_dim: K, the number of atoms.
        penalty: lambda, in nats for each unit of |z_k|.
        noise_scale: sigma, in units of x.
        settings: how it is fitted.
        seed: of starts and data order.
    """

    train: Float[Tensor, "N D"]
    latent_dim: int
    penalty: float
    noise_scale: float
    settings: SparseSettings = field(default_factory=SparseSettings)
    seed: int = 0

    def decoder(self) -> nn.Sequential:
        """Random unit atoms, the same for every stage."""
        with seeded(self.seed):
            linear = nn.Linear(self.latent_dim, self.train.shape[1])
        return nn.Sequential(NormalizedColumns(linear, "unit"))

    def autoencoder(self, decoder: nn.Module | None = None, **parts: Any) -> Autoencoder:
        """The model with an encoder or guide, its bias at the means of x's columns.

        Args:
            decoder: by default a new one.
            **parts: ``encoder`` or ``guide``; by default a guide with a free code per datum.
        """
        if not parts:
            guide = PerDatumGuide(len(self.train), self.latent_dim, covariance="delta")
            parts = {"guide": guide}
        made = Autoencoder(
            decoder=self.decoder() if decoder is None else decoder,
            data_dim=self.train.shape[1],
            latent_dim=self.latent_dim,
            likelihood=Gaussian(self.noise_scale),
            prior="laplace",
            penalty=self.penalty,
            **parts,
        )
        return made.to(self.train).center(self.train)

    def best(self, autoencoder: Autoencoder, x: Float[Tensor, "N D"]) -> Any:
        """The best codes of rows under the autoencoder's dictionary."""
        return best_codes(autoencoder, x, tolerance=TOLERANCE * self.penalty)

    def svi(self, autoencoder: Autoencoder) -> FitResult:
        """Fit dictionary and codes, or encoder, by SVI under the settings."""
        settings = self.settings
        return fit_svi(
            autoencoder.model,
            autoencoder.guide,
            self.train,
            steps=settings.steps,
            batch_size=min(settings.batch_size, len(self.train)),
            lr=settings.lr,
            scheduler=torch.optim.lr_scheduler.CosineAnnealingLR,
            seed=self.seed,
        )


@dataclass(frozen=True)
class SparseStage:
    """A stage: what the table says of it, and how it is climbed.

    Attributes:
        name: by which it is asked for.
        codes: who finds the codes.
        algorithm: what fits the dictionary.
        climb: the fitted autoencoder, and how the fit went; None if nothing was fitted.
    """

    name: str
    codes: str
    algorithm: str
    run: Callable[[SparseTask], tuple[Autoencoder, FitResult | None]]


def _random(task: SparseTask) -> tuple[Autoencoder, None]:
    autoencoder = task.autoencoder()
    with torch.no_grad():
        autoencoder.guide.loc.copy_(task.best(autoencoder, task.train).codes)
    return autoencoder, None


def _alternating(task: SparseTask) -> tuple[Autoencoder, FitResult]:
    autoencoder = task.autoencoder()
    fit = fit_dictionary(autoencoder, task.train, max_iterations=task.settings.iterations)
    return autoencoder, fit


def _by_svi(make: Callable[[SparseTask], Autoencoder]) -> Any:
    def run(task: SparseTask) -> tuple[Autoencoder, FitResult]:
        autoencoder = make(task)
        return autoencoder, task.svi(autoencoder)

    return run


def _thresholded(hidden: bool) -> Callable[[SparseTask], Autoencoder]:
    def make(task: SparseTask) -> Autoencoder:
        widths = task.settings.hidden if hidden else ()
        encoder = mlp(task.train.shape[1], task.latent_dim, widths, seed=task.seed)
        return task.autoencoder(encoder=encoder.append(SoftThreshold(task.latent_dim)))

    return make


def _unrolled(task: SparseTask) -> Autoencoder:
    start: Any = task.autoencoder().decoder
    threshold = task.penalty * task.noise_scale**2
    lista = LISTA(start[0], threshold, steps=task.settings.unrolled)
    return task.autoencoder(encoder=lista)


REFERENCE = "alternating"
_STAGES = (
    SparseStage("random-atoms", "lasso", "none", _random),
    SparseStage(REFERENCE, "lasso", "alternation", _alternating),
    SparseStage("per-datum-svi", "free z_n", "SVI", _by_svi(SparseTask.autoencoder)),
    SparseStage("linear-encoder", "linear", "SVI", _by_svi(_thresholded(hidden=False))),
    SparseStage("mlp-encoder", "MLP", "SVI", _by_svi(_thresholded(hidden=True))),
    SparseStage("unrolled-encoder", "LISTA", "SVI", _by_svi(_unrolled)),
)
SPARSE_STAGES: Mapping[str, SparseStage] = {stage.name: stage for stage in _STAGES}
