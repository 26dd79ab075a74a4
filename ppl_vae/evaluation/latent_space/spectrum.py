"""The eigenvalues of the data's covariance, and the axes that collapse at a given noise
variance."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.results import Result
from ppl_vae.core.validation import ArrayLike, check_int
from ppl_vae.data.sources.row_blocks import RowBlocks
from ppl_vae.models.linear.linear_gaussian import LatentPosterior, MissingnessPatterns
from ppl_vae.models.linear.sufficient_statistics import SampleCovariance
from ppl_vae.models.ppca import PPCA


@dataclass(frozen=True)
class Spectrum(Result):
    """The eigenvalues of the data's covariance, and noise variances to compare them with.

    With noise variance s2, the maximum-likelihood column of PPCA for axis i is zero if and only if
    l_i <= s2: the axis collapses. For a nonlinear decoder this is a rule of thumb, not a theorem.

    Attributes:
        eigenvalues: eigenvalues of the covariance (with denominator N), largest first, (D,), in
            squared units of the data.
        latent_dim: K.
        noise: noise variances by name of the model.
        standardized: whether all values refer to standardised columns, in squared standard
            deviations.
    """

    eigenvalues: Float[Tensor, " D"]
    latent_dim: int
    noise: dict[str, float]
    standardized: bool = False

    def collapsing(self, noise_variance: float) -> list[int]:
        """The indices of those of the K leading axes that collapse at this noise variance."""
        leading = self.eigenvalues[: self.latent_dim]
        return (leading <= noise_variance).nonzero().flatten().tolist()


def spectrum(
    x: ArrayLike, latent_dim: int, noise: Mapping[str, float], *, ppca: PPCA | None = None
) -> Spectrum:
    """Compute the eigenvalues of the data's covariance, for comparison with noise variances.

    Args:
        x: data, (N, D); NaN marks a missing value.
        latent_dim: K.
        noise: noise variances by name.
        ppca: a fitted model, required if x has missing values: the spectrum is then that of the
            expected sample covariance under the model given the observed values. At a fixed point
            of EM, the model is the closed-form solution for exactly this covariance.

    Raises:
        ValueError: if x has missing values and ppca is None; if K is not a whole number >= 1.

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


def model_noise_variance(
    owner: Any, x: Float[Tensor, "N D"]
) -> tuple[float | None, Float[Tensor, "N D"], bool]:
    """The noise variance of a model, the data in its units, and whether those are standardised.

    Args:
        owner: the object whose method the model is, with ``noise_scale`` or a likelihood with
            ``scale``. The variance is None if that is not a single number.
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
    """The expected sample covariance (denominator N) given the observed values, under a model.

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
    for block in RowBlocks(x, device=loc.device, schema=ppca.schema).read(
        len(loc) * (4 + ppca.latent_dim)
    ):
        rows += len(block.values)
        values = block.values - loc
        if block.observed is not None:
            patterns = MissingnessPatterns.distinct(block.observed, loc)
            found = LatentPosterior.of(block.values, patterns, loadings, loc, variance)
            values = torch.where(block.observed, values, found.mean @ loadings.mT)
            missing = (~block.observed).to(loc)
            spread = patterns.gather_rows(loadings @ found.covariances.tril) * missing[..., None]
            spread = spread.movedim(1, 0).flatten(1)
            second += spread @ spread.mT + (variance * missing.sum(0)).diag()
        total, second = total + values.sum(0), second + values.mT @ values
    mean = total / rows
    return second / rows - torch.outer(mean, mean)
