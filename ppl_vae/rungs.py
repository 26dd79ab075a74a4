"""The rungs of the ladder: which model, which guide, which algorithm."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro.infer
import torch
from torch import Tensor

from ppl_vae.evaluation.ascent import Ascent, Recording, em_ascent
from ppl_vae.families import num_scale_outputs
from ppl_vae.guides import AmortizedGuide, ExactGuide, MeanFieldGuide
from ppl_vae.inference.em import fit_closed_form, fit_em, variational_em
from ppl_vae.inference.pca import fit_pca, implied_gaussian
from ppl_vae.inference.progress import Report
from ppl_vae.inference.svi import fit_svi
from ppl_vae.models.autoencoder import Autoencoder
from ppl_vae.models.gaussian import Gaussian
from ppl_vae.models.networks import mlp
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.vae import VAE
from ppl_vae.objectives import ELBO, IWAE
from ppl_vae.program import ProgramLike
from ppl_vae.results import FitResult

HIDDEN = (256,)
IWAE_SAMPLES = 8
SCORE = ELBO(gradient="score")
"""The same ELBO by its score: what gradients through the draws are worth."""
POINT = "a point"
"""The q of an autoencoder, which makes no bound."""
NO_CLOSED_FORM = "with holes the likelihood has no maximum in closed form"


@dataclass(frozen=True)
class Settings:
    """How every SVI rung is fitted and every rung is measured: the same for all of them.

    Attributes:
        steps: at most.
        batch_size: at most.
        lr: of Adam, falling to zero along a cosine.
        patience: looks at the validation rows without a better one.
        gap_rows: at most so many rows are used to measure gaps, and to estimate held-out log p.
        draws: a datum, where log p is estimated.
        refine: steps of the search for each datum's best q.
        annealed_rows: at most so many held-out data get a second opinion, by annealing.
        temperatures: of these chains.
    """

    steps: int = 1500
    batch_size: int = 256
    lr: float = 1e-2
    patience: int = 20
    gap_rows: int = 500
    draws: int = 1000
    refine: int = 150
    annealed_rows: int = 40
    temperatures: int = 100


@dataclass(frozen=True)
class Task:
    """What a rung is fitted to.

    Attributes:
        train: rows to fit.
        val: rows for early stopping.
        latent_dim: K.
        settings: of SVI.
        seed: of starts, data order and draws.
        report: is told of the steps done while SVI runs.
    """

    train: Tensor
    val: Tensor
    latent_dim: int
    settings: Settings = field(default_factory=Settings)
    seed: int = 0
    report: Report | None = None

    def svi(
        self,
        model: ProgramLike,
        guide: ProgramLike,
        *,
        early_stopping: bool = False,
        objective: pyro.infer.ELBO | None = None,
        recording: Recording | None = None,
    ) -> FitResult:
        """Fit a pair by SVI under the settings."""
        listeners = [listener for listener in (self.report, recording) if listener is not None]

        def tell(step: int, value: float) -> None:
            for listener in listeners:
                listener(step, value)

        looks: dict[str, Any] = {}
        if early_stopping:
            looks = {"x_val": self.val, "patience": self.settings.patience}
        return fit_svi(
            model,
            guide,
            self.train,
            steps=self.settings.steps,
            batch_size=min(self.settings.batch_size, len(self.train)),
            lr=self.settings.lr,
            scheduler=torch.optim.lr_scheduler.CosineAnnealingLR,
            objective=objective,
            progress=tell,
            seed=self.seed,
            **looks,
        )

    def ppca(self) -> PPCA:
        """Where every PPCA rung starts."""
        return PPCA.like(self.train, self.latent_dim, seed=self.seed)

    @property
    def holes(self) -> int:
        """How many cells of the training rows are missing."""
        return int(self.train.isnan().sum())

    def optimum(self) -> PPCA:
        """PPCA at its maximum likelihood: the closed form, or with holes where PX-EM ends."""
        ppca = self.ppca()
        fit = fit_em if self.holes else fit_closed_form
        fit(ppca, self.train)
        return ppca


@dataclass(frozen=True)
class Fitted:
    """A rung after its fit.

    Attributes:
        model, guide: the pair.
        fit: how it went.
        best: a guide known to be the best of the guide's family for each datum, if there is one.
        ascent: bound and log p as they rose, where both are exact.
        bounded: whether what was fitted has a bound on log p. An autoencoder has none: its pair
            is the Gaussian it implies, with the exact posterior.
    """

    model: ProgramLike
    guide: ProgramLike
    fit: FitResult
    best: ProgramLike | None = None
    ascent: Ascent | None = None
    bounded: bool = True


@dataclass(frozen=True)
class Rung:
    """A row of the ladder's table.

    Attributes:
        name: by which it is asked for.
        model, q, algorithm: what the table says.
        climb: fits it.
        complete: why it needs data without holes; empty if it does not.
    """

    name: str
    model: str
    q: str
    algorithm: str
    climb: Callable[[Task], Fitted]
    complete: str = ""


def _implied(fit: Callable[[Task, Autoencoder], FitResult], **kind: Any) -> Any:
    def climb(task: Task) -> Fitted:
        made = Autoencoder.linear(task.train.shape[1], task.latent_dim, seed=task.seed, **kind)
        autoencoder = made.to(task.train)
        result = fit(task, autoencoder)
        ppca = implied_gaussian(autoencoder, task.train).to(task.train)
        guide = ExactGuide(ppca)
        return Fitted(ppca.model, guide, result, best=guide, bounded=False)

    return climb


def _pca(task: Task, autoencoder: Autoencoder) -> FitResult:
    return fit_pca(autoencoder, task.train)


def _squares(task: Task, autoencoder: Autoencoder) -> FitResult:
    return task.svi(autoencoder.model, autoencoder.guide)


def _exact(fit: Callable[[PPCA, Tensor], FitResult], covariance: str = "full") -> Any:
    def climb(task: Task) -> Fitted:
        ppca = task.ppca()
        result = fit(ppca, task.train)
        guide = ExactGuide(ppca, covariance=covariance)
        ascent = em_ascent(result) if len(result.objective) == 2 * result.steps else None
        return Fitted(ppca.model, guide, result, best=guide, ascent=ascent)

    return climb


def _svi(make_guide: Callable[[Task, PPCA], Any], covariance: str) -> Any:
    def climb(task: Task) -> Fitted:
        ppca = task.ppca()
        guide = make_guide(task, ppca)
        recording = Recording(ppca, guide, task.train)
        recording(0, 0.0)
        fit = task.svi(ppca.model, guide, recording=recording)
        best = ExactGuide(ppca, covariance=covariance)
        return Fitted(ppca.model, guide, fit, best=best, ascent=recording.ascent())

    return climb


def _per_datum(task: Task, ppca: PPCA) -> MeanFieldGuide:
    return MeanFieldGuide(len(task.train), task.latent_dim).to(task.train)


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
    encoder = mlp(ppca.data_dim, k + num_scale_outputs("diagonal", k), HIDDEN, seed=task.seed)
    return AmortizedGuide(encoder, k).to(task.train)


def _vae(objective: pyro.infer.ELBO | None) -> Callable[[Task], Fitted]:
    def climb(task: Task) -> Fitted:
        # With average variance one, noise of a half leaves the latents something to explain.
        likelihood = Gaussian("shared", initial=0.5**0.5)
        shape = {"hidden": HIDDEN, "activation": "gelu", "likelihood": likelihood}
        vae = VAE.mlp(task.train.shape[1], task.latent_dim, seed=task.seed, **shape)
        fit = task.svi(vae.model, vae.guide, early_stopping=True, objective=objective)
        return Fitted(vae.model, vae.guide, fit)

    return climb


_RUNGS = (
    Rung("pca", "PPCA", POINT, "eigenvectors", _implied(_pca), "PCA has no place for holes"),
    Rung("linear-autoencoder", "PPCA", POINT, "SVI, squares", _implied(_squares)),
    Rung("closed-form", "PPCA", "exact", "closed form", _exact(fit_closed_form), NO_CLOSED_FORM),
    Rung("em", "PPCA", "exact", "EM", _exact(lambda p, x: fit_em(p, x, accelerate=False))),
    Rung("px-em", "PPCA", "exact", "PX-EM", _exact(fit_em)),
    Rung(
        "variational-em", "PPCA", "q_i, diag", "rotating VEM", _exact(variational_em, "diagonal")
    ),
    Rung("per-datum-svi", "PPCA", "q_i, diag", "SVI", _svi(_per_datum, "diagonal")),
    Rung("exact-svi", "PPCA", "exact", "SVI", _svi(_exact_guide, "full")),
    Rung("linear-amortized", "PPCA", "linear, diag", "SVI", _svi(_linear("diagonal"), "diagonal")),
    Rung("deep-amortized", "PPCA", "MLP, diag", "SVI", _svi(_deep, "diagonal")),
    Rung("isotropic-q", "PPCA", "linear, v I", "SVI", _svi(_linear("isotropic"), "isotropic")),
    Rung("unit-q", "PPCA", "linear, I", "SVI", _svi(_linear("unit"), "unit")),
    Rung("vae", "MLP", "MLP, diag", "SVI", _vae(None)),
    Rung("iwae", "MLP", "MLP, diag", f"SVI, S={IWAE_SAMPLES}", _vae(IWAE(IWAE_SAMPLES))),
    Rung("score-vae", "MLP", "MLP, diag", "SVI, score", _vae(SCORE)),
)
RUNGS: Mapping[str, Rung] = {rung.name: rung for rung in _RUNGS}


def left_out(names: Iterable[str], holes: bool) -> dict[str, str]:
    """Which of these rungs data with holes, or without, leave out, and why."""
    known = (RUNGS[name] for name in names if holes and name in RUNGS)
    return {rung.name: rung.complete for rung in known if rung.complete}
