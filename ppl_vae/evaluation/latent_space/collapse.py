"""The information in latent codes: KL per dimension, mutual information, posterior collapse.

Two failures are opposite. Posterior collapse: q(z | x) is the prior for every x. A lookup table:
q(z | x) of each datum is narrow and far from all others and from the prior, so that z identifies
the datum and is not compressed.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ppl_vae.core.pair import Pair
from ppl_vae.core.program import ProgramLike
from ppl_vae.core.state import isolated_store, seeded
from ppl_vae.core.validation import ArrayLike, check_int
from ppl_vae.evaluation.latent_space.aggregate_posterior import CodeStatistics, code_densities
from ppl_vae.evaluation.latent_space.collapse_result import Collapse
from ppl_vae.evaluation.latent_space.spectrum import Spectrum, model_noise_variance, spectrum
from ppl_vae.models.ppca import PPCA
from ppl_vae.objectives.divergences import check_latents
from ppl_vae.objectives.divergences import site_kl_by_dimension as kl_of_site


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
    """KL(q(z_k | x) || p(z_k)) averaged over the data, in nats, for each latent dimension.

    It is computed in closed form where that is known, else from one draw per datum. A dimension
    whose KL is zero has collapsed: its q is the prior for every datum.

    Args:
        model, guide: any pair under the contract; run in evaluation mode.
        x: the whole data set, (N, D); a guide with per-datum parameters finds rows by position.
        mask: True where x is observed; NaN in x is equivalent.
        batch_size: number of rows evaluated at once.
        seed: seed of the draws.

    Raises:
        ValueError: if q does not factorize over dimensions (a full covariance) or p(z) is not a
            density.
    """
    pair = Pair(model, guide)
    data, total = pair.observe(x, mask), torch.zeros(())
    with isolated_store(), seeded(seed), pair.eval_mode():
        for batch in data.split(torch.arange(len(data)), batch_size):
            run = pair.run(batch)
            check_latents(run)
            kl = torch.cat([kl_of_site(run, name) for name in run.latent])
            total = total + kl.double().cpu() * len(batch) / len(data)
    return total


@torch.no_grad()
def collapse(
    model: ProgramLike,
    guide: ProgramLike,
    x: ArrayLike,
    *,
    num_samples: int = 4,
    noise_variance: float | None = None,
    mask: ArrayLike | None = None,
    rows: Int[Tensor, " R"] | None = None,
    seed: int | None = None,
) -> Collapse:
    """Diagnose posterior collapse: the dimensions in use, and the dependence of z on x.

    The mean KL is split into the mutual information of x and z and the KL of the aggregate
    posterior. Each draw is evaluated under every datum: N^2 S densities in bounded memory.

    Args:
        model, guide: any pair under the contract; run in evaluation mode. The code of a datum
            consists of all its latent sites.
        x: the whole data set, (N, D).
        num_samples: draws per datum, S.
        noise_variance: noise variance with which the eigenvalues of the data are compared; by
            default the model's (``noise_scale``, or its likelihood's ``scale``, if it is a single
            number).
        mask: True where x is observed; NaN in x is equivalent.
        rows: indices of the rows of x that are evaluated, which are then the N data; by default
            all rows.
        seed: seed of the draws.

    Raises:
        ValueError: if data or arguments are invalid, there are fewer than two rows, or the guide
            has no density.

    References:
        Hoffman, Johnson: ELBO surgery (2016): the three terms.
        Burda, Grosse, Salakhutdinov: Importance Weighted Autoencoders (2016): active units.
        Poole, Ozair, van den Oord, Alemi, Tucker: On variational bounds of mutual information
        (2019): with a datum's own density in the mixture it is a lower bound, at most log N.
        Lucas, Tucker, Grosse, Norouzi: Don't blame the ELBO! (2019): the threshold.
    """
    pair = Pair(model, guide)
    data = pair.observe(x, mask)
    num_samples = check_int("num_samples", num_samples)
    rows = torch.arange(len(data)) if rows is None else rows
    if len(rows) < 2:
        raise ValueError(f"mutual information needs at least 2 rows of x; there is {len(rows)}")
    with isolated_store(), seeded(seed), pair.eval_mode():
        blocks = code_densities(pair, data, rows.to(data.x.device), num_samples)
        parts = [(block.names(), block.per_datum(len(rows))) for block in blocks]
    names = parts[0][0]
    found = CodeStatistics(*map(torch.cat, zip(*(columns for _, columns in parts), strict=True)))
    values = data.x if data.mask is None else torch.where(data.mask, data.x, math.nan)
    return Collapse(
        names=names,
        kl_by_dimension=found.kl_by_dimension.mean(0),
        mean_variances=found.means.var(0, correction=0) - found.mean_variance.mean(0),
        kl=found.kl,
        closed_kl=found.closed_kl,
        information=found.information,
        aggregate=found.aggregate,
        retrieval_prob=found.retrieval_prob,
        moment_kl=_moment_kl(found.first.mean(0), found.second.mean(0)),
        spectrum=_spectrum(pair.model_owner, values[rows], len(names), noise_variance),
        num_samples=num_samples,
    )


def _moment_kl(first: Float[Tensor, " k"], second: Float[Tensor, " k"]) -> float:
    # KL(N(m, v) || N(0, 1)) = 1/2 (v + m^2 - 1 - log v), summed over dimensions.
    mean, variance = first, second - first.square()
    return float(0.5 * (variance + mean.square() - 1 - variance.log()).sum())


def _spectrum(
    owner: Any, x: Float[Tensor, "N D"], latent_dim: int, variance: float | None
) -> Spectrum | None:
    standardized = False
    if variance is None:
        variance, x, standardized = model_noise_variance(owner, x)
    has_missing = bool(x.isnan().any())
    ppca = owner if isinstance(owner, PPCA) and has_missing else None
    if variance is None or (has_missing and ppca is None):
        return None
    found = spectrum(x, latent_dim, {"model": variance}, ppca=ppca)
    return replace(found, standardized=standardized)
