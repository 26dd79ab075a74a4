"""The eigenvalues of the data's covariance, and which axes have no use under a noise variance."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.results import Result
from ppl_vae.core.validation import ArrayLike, check_int
from ppl_vae.data.row_blocks import RowBlocks
from ppl_vae.models.linear_gaussian import LatentPosterior, MissingnessPatterns
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.sufficient_statistics import SampleCovariance


@dataclass(frozen=True)
class Spectrum(Result):
    """The eigenvalues of the data's covariance, and noise variances to hold against them.

    With noise variance s2, PPCA's best column for axis i is zero if and only if l_i <= s2: the
    axis collapses. For a nonlinear decoder this is a guide, not a theorem.

    Attributes:
        eigenvalues: of the covariance over N, largest first, (D,), in the data's units squared.
        latent_dim: K.
        noise: noise variances by name of the model.
        standardized: whether all of it is of standardised columns, in squared standard
            deviations.
    """

    eigenvalues: Float[Tensor, " D"]
    latent_dim: int
    noise: dict[str, float]
    standardized: bool = False

    def collapsing(self, noise_variance: float) -> list[int]:
        """Which of the K leading axes (from 0) have no column under this noise variance."""
        leading = self.eigenvalues[: self.latent_dim]
        return (leading <= noise_variance).nonzero().flatten().tolist()


def spectrum(
    x: ArrayLike, latent_dim: int, noise: Mapping[str, float], *, ppca: PPCA | None = None
) -> Spectrum:
    """The data's spectrum beside noise variances.

    Args:
        x: data, (N, D); NaN marks a missing value.
        latent_dim: K.
        noise: noise variances by name.
        ppca: a fitted model, needed where x has missing values: the spectrum is then that of the
            sample covariance's expectation under it, given what was observed. Where EM ends, the
            model is the closed form for exactly this covariance.

    Raises:
        ValueError: if x has NaN and there is no ppca; if K is no whole number >= 1.

    References:
        Tipping, Bishop: Probabilistic principal component analysis (1999), appendix A.
        Lucas, Tucker, Grosse, Norouzi: Don't blame the ELBO! (2019).
    """
    check_int("latent_dim", latent_dim)
    if ppca is not None:
        values = torch.linalg.eigvalsh(expected_covariance(ppca, x)).flip(0).cpu().clamp(min=0)
        return Spectrum(values, latent_dim, dict(noise))
    covariance = SampleCovariance.of(x)
    values = torch.zeros(covariance.data_dim, dtype=torch.float64)
    found = covariance.eigh()[0].cpu()
    values[: len(found)] = found
    return Spectrum(values, latent_dim, dict(noise))


def own_noise(
    owner: Any, x: Float[Tensor, "N D"]
) -> tuple[float | None, Float[Tensor, "N D"], bool]:
    """A model's own noise variance, the data in the units of it, and whether these are columns'.

    Args:
        owner: what the model's program belongs to; with ``noise_scale``, or a likelihood with
            ``scale``. The variance is None if that is not one number.
        x: the data.
    """
    likelihood: Any = getattr(owner, "likelihood", None)
    scale = getattr(owner, "noise_scale", getattr(likelihood, "scale", None))
    relative = bool(getattr(likelihood, "relative", False))
    if scale is None or torch.as_tensor(scale).numel() != 1:
        return None, x, relative
    return float(scale) ** 2, likelihood.to_units(x) if relative else x, relative


@torch.no_grad()
def expected_covariance(ppca: PPCA, x: ArrayLike) -> Float[Tensor, "D D"]:
    """The sample covariance over N of the whole data, expected under a model given the seen part.

    The missing values of a row have mean W m + mu and covariance W V W' + Psi given the row.

    Args:
        ppca: PPCA or factor analysis.
        x: data, (N, D); NaN marks a missing value.
    """
    loadings, loc, scale = (
        value.detach().double() for value in (ppca.loadings, ppca.loc, ppca.noise_scale)
    )
    variance = scale.square().expand(len(loc))
    total, second, rows = torch.zeros_like(loc), torch.zeros_like(loc).diag(), 0
    for block in RowBlocks(x, device=loc.device).read(len(loc) * (4 + ppca.latent_dim)):
        rows += len(block.values)
        values = block.values - loc
        if block.observed is not None:
            patterns = MissingnessPatterns.shared(block.observed, loc)
            found = LatentPosterior.of(block.values, patterns, loadings, loc, variance)
            values = torch.where(block.observed, values, found.mean @ loadings.mT)
            hidden = (~block.observed).to(loc)
            spread = patterns.gather_rows(loadings @ found.tril) * hidden[..., None]
            spread = spread.movedim(1, 0).flatten(1)
            second += spread @ spread.mT + (variance * hidden.sum(0)).diag()
        total, second = total + values.sum(0), second + values.mT @ values
    mean = total / rows
    return second / rows - torch.outer(mean, mean)
