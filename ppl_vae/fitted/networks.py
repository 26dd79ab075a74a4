"""Fits of models with an encoder and a decoder."""

import math
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.fit_result import FitResult
from ppl_vae.fitted.settings import FitSettings
from ppl_vae.inference.svi.fit import fit_svi
from ppl_vae.inference.svi.progress import ProgressCallback
from ppl_vae.likelihoods.base import Likelihood
from ppl_vae.likelihoods.discrete import (
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    Multinomial,
    Poisson,
)
from ppl_vae.models.autoencoder import Autoencoder
from ppl_vae.models.vae import VAE
from ppl_vae.objectives.bounds import ELBO, IWAE

MIN_STEPS = 3000
"""The number of steps that a fit makes at least, unless the number of epochs is given."""
MIN_EPOCHS = 50


def fit_networks(
    x: Float[Tensor, "N D"],
    x_val: Float[Tensor, "V D"],
    latent_dim: int,
    settings: FitSettings,
    *,
    checkpoint: Path | None,
    progress: bool | str | ProgressCallback,
) -> tuple[VAE | Autoencoder, FitResult]:
    """Fit a VAE or an autoencoder by SVI, until its validation ELBO stops improving.

    Args:
        x, x_val: training and validation rows in the units of the model.
        latent_dim: K.
        settings: the settings of the fit.
        checkpoint: a file to resume from, and to write.
        progress: as for :func:`ppl_vae.fit_svi`.
    """
    x, x_val = x.float(), x_val.float()
    program = _program(x, latent_dim, settings)
    fit = fit_svi(
        program.model,
        program.guide,
        x,
        x_val=x_val,
        objective=IWAE() if settings.model == "iwae" else ELBO(),
        lr=settings.learning_rate,
        epochs=settings.epochs or default_epochs(len(x), settings.batch_size),
        batch_size=min(settings.batch_size, len(x)),
        patience=settings.patience,
        device=settings.device,
        seed=settings.seed,
        capture=settings.compile,
        checkpoint=checkpoint,
        progress=progress,
    )
    return program.to("cpu"), fit


def default_epochs(num_rows: int, batch_size: int) -> int:
    """The number of epochs with at least 50 epochs and 3,000 steps."""
    return max(MIN_EPOCHS, math.ceil(MIN_STEPS / math.ceil(num_rows / batch_size)))


def _program(x: Tensor, latent_dim: int, settings: FitSettings) -> VAE | Autoencoder:
    missing = "zeros+mask" if bool(x.isnan().any()) else "zeros"
    likelihood = _likelihood(settings.likelihood, x)
    if settings.model != "autoencoder":
        return VAE.like(
            x,
            latent_dim,
            hidden=settings.hidden,
            likelihood=likelihood,
            missing=missing,
            seed=settings.seed,
        )
    program = Autoencoder.mlp(
        x.shape[1],
        latent_dim,
        hidden=settings.hidden,
        likelihood=likelihood,
        missing=missing,
        seed=settings.seed,
    )
    return program.center(x)


def _likelihood(name: str, x: Tensor) -> Likelihood | None:
    # None is the Gaussian likelihood that suits the class of the model.
    if name == "gaussian":
        return None
    if name == "categorical":
        return Categorical(int(torch.nan_to_num(x).max()) + 1)
    kinds: dict[str, type[Likelihood]] = {
        "bernoulli": Bernoulli,
        "continuous-bernoulli": ContinuousBernoulli,
        "poisson": Poisson,
        "multinomial": Multinomial,
    }
    return kinds[name]()
