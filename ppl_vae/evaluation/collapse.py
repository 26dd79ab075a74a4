"""Which latent dimensions are used: KL a dimension, and what the data's spectrum says of it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.arguments import ArrayLike, at_least
from ppl_vae.blocks import RowBlocks
from ppl_vae.divergences import kl_by_dimension as kl_of_site
from ppl_vae.models.linear_gaussian import Patterns, Solution
from ppl_vae.models.moments import SampleCovariance
from ppl_vae.models.ppca import PPCA
from ppl_vae.objectives import batch_keywords
from ppl_vae.program import ProgramLike, as_observed
from ppl_vae.results import Result
from ppl_vae.state import isolated_store, mode, seeded
from ppl_vae.traces import run_pair


@torch.no_grad()
def kl_by_dimension(
    model: ProgramLike,
    guide: ProgramLike,
    x: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    batch_size: int = 4096,
    seed: int | None = None,
) -> Float[Tensor, " K"]:
    """KL(q(z_k | x) || p(z_k)) averaged over the data, in nats, one a latent dimension.

    In closed form where it is known, else from one draw a datum. A dimension with none is not
    used: its q is the prior for every datum (it has collapsed).

    Args:
        model, guide: any pair under the contract; run in evaluation mode.
        x: the whole data, (N, D); rows are looked up by their place in it.
        mask: True where x is observed; NaN in x says the same.
        batch_size: rows held at once.
        seed: of the draws.

    Raises:
        ValueError: if the guide is no product over latent dimensions (a full covariance).
    """
    x, mask = as_observed(x, mask, model=model, guide=guide)
    total = torch.zeros(())
    with isolated_store(), seeded(seed), mode(model, guide, training=False):
        for rows in torch.arange(len(x), device=x.device).split(batch_size):
            run = run_pair(model, guide, x[rows], batch_keywords(x, mask, rows))
            kl = torch.cat([kl_of_site(run, name) for name in run.latent])
            total = total + kl.double().cpu() * len(rows) / len(x)
    return total


@dataclass(frozen=True)
class Spectrum(Result):
    """The eigenvalues of the data's covariance, and noise variances to hold against them.

    With noise variance s2, PPCA's best column for axis i is zero if and only if l_i <= s2: the
    axis collapses. For a nonlinear decoder this is a guide, not a theorem.

    Attributes:
        eigenvalues: of the covariance over N, largest first, (D,), in the data's units squared.
        latent_dim: K.
        noise: noise variances by name of the model.
    """

    eigenvalues: Float[Tensor, " D"]
    latent_dim: int
    noise: dict[str, float]

    def collapsing(self, noise_variance: float) -> list[int]:
        """Which of the K leading axes (from 0) have no column under this noise variance."""
        leading = self.eigenvalues[: self.latent_dim]
        return (leading <= noise_variance).nonzero().flatten().tolist()


def spectrum(
    x: ArrayLike, latent_dim: int, noise: Mapping[str, float], *, ppca: PPCA | None = None
) -> Spectrum:
    """The data's spectrum beside noise variances.

    Args:
        x: data, (N, D); NaN is a hole.
        latent_dim: K.
        noise: noise variances by name.
        ppca: a fitted model, needed where x has holes: the spectrum is then that of the sample
            covariance's expectation under it, given what was observed. Where EM ends, the model
            is the closed form for exactly this covariance.

    Raises:
        ValueError: if x has NaN and there is no ppca; if K is no whole number >= 1.

    References:
        Tipping, Bishop: Probabilistic principal component analysis (1999), appendix A.
        Lucas, Tucker, Grosse, Norouzi: Don't blame the ELBO! (2019).
    """
    at_least("latent_dim", latent_dim)
    if ppca is not None:
        values = torch.linalg.eigvalsh(expected_covariance(ppca, x)).flip(0).cpu().clamp(min=0)
        return Spectrum(values, latent_dim, dict(noise))
    covariance = SampleCovariance.of(x)
    values = torch.zeros(covariance.data_dim, dtype=torch.float64)
    found = covariance.eigh()[0].cpu()
    values[: len(found)] = found
    return Spectrum(values, latent_dim, dict(noise))


@torch.no_grad()
def expected_covariance(ppca: PPCA, x: ArrayLike) -> Float[Tensor, "D D"]:
    """The sample covariance over N of the whole data, expected under a model given the seen part.

    The holes of a row have mean W m + mu and covariance W V W' + Psi given the row.

    Args:
        ppca: PPCA or factor analysis.
        x: data, (N, D); NaN is a hole.
    """
    loadings, loc, scale = (
        value.detach().double() for value in (ppca.loadings, ppca.loc, ppca.noise_scale)
    )
    variance = scale.square().expand(len(loc))
    total, second, rows = torch.zeros_like(loc), torch.zeros_like(loc).diag(), 0
    for block in RowBlocks(x, device=loc.device).read(len(loc) * (4 + ppca.latent_dim)):
        rows += len(block.values)
        values = block.values - loc
        if block.seen is not None:
            patterns = Patterns.shared(block.seen, loc)
            found = Solution.of(block.values, patterns, loadings, loc, variance)
            values = torch.where(block.seen, values, found.mean @ loadings.mT)
            hidden = (~block.seen).to(loc)
            spread = patterns.spread(loadings @ found.tril) * hidden[..., None]
            spread = spread.movedim(1, 0).flatten(1)
            second += spread @ spread.mT + (variance * hidden.sum(0)).diag()
        total, second = total + values.sum(0), second + values.mT @ values
    mean = total / rows
    return second / rows - torch.outer(mean, mean)
