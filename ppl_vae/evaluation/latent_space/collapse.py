"""What codes are used for: KL per dimension, mutual information, and what the spectrum says of it.

Two failures have opposite signs. Posterior collapse: q(z | x) is the prior whatever x is. A code
that is not compressed: each datum has a place of its own, far out and narrow, and z is no more
than a table to look x up in.
"""

import math
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ppl_vae.core.batch import Batch
from ppl_vae.core.pair import Pair
from ppl_vae.core.program import ProgramLike, as_data_and_mask, bound_object
from ppl_vae.core.state import eval_mode, isolated_store, seeded
from ppl_vae.core.validation import ArrayLike, check_int
from ppl_vae.evaluation.latent_space.aggregate import coded
from ppl_vae.evaluation.latent_space.collapse_result import (
    Collapse,
)
from ppl_vae.evaluation.latent_space.spectrum import Spectrum, own_noise, spectrum
from ppl_vae.models.ppca import PPCA
from ppl_vae.objectives.bounds import batch_keywords
from ppl_vae.objectives.divergences import check_latents
from ppl_vae.objectives.divergences import kl_by_dimension as kl_of_site


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

    In closed form where it is known, else from one draw per datum. A dimension with none is not
    used: its q is the prior for every datum (it has collapsed).

    Args:
        model, guide: any pair under the contract; run in evaluation mode.
        x: the whole data, (N, D); rows are looked up by their place in it.
        mask: True where x is observed; NaN in x says the same.
        batch_size: rows held at once.
        seed: of the draws.

    Raises:
        ValueError: if q is no product over dimensions (a full covariance) or p(z) no density.
    """
    x, mask = as_data_and_mask(x, mask, model=model, guide=guide)
    total = torch.zeros(())
    with isolated_store(), seeded(seed), eval_mode(model, guide):
        for rows in torch.arange(len(x), device=x.device).split(batch_size):
            run = Pair(model, guide).run(Batch(x[rows], **batch_keywords(x, mask, rows)))
            check_latents(run)
            kl = torch.cat([kl_of_site(run, name) for name in run.latent])
            total = total + kl.double().cpu() * len(rows) / len(x)
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
    """What the codes of a pair hold: of the data, and beyond the prior; and which are unused.

    Each draw is weighed against every datum: N^2 S densities, in memory that does not grow.

    Args:
        model, guide: any pair under the contract; run in evaluation mode. All latent sites of a
            datum are its code together.
        x: the whole data, (N, D).
        num_samples: draws per datum, S.
        noise_variance: in whose light the data's spectrum is seen; by default the model's own
            (``noise_scale``, or its likelihood's ``scale``, if that is one number).
        mask: True where x is observed; NaN in x says the same.
        rows: look at these rows of x only, as N; by default at all.
        seed: of the draws.

    Raises:
        ValueError: bad data or arguments, fewer than two rows; a guide without a density.

    References:
        Hoffman, Johnson: ELBO surgery (2016): the three terms.
        Burda, Grosse, Salakhutdinov: Importance Weighted Autoencoders (2016): active units.
        Poole, Ozair, van den Oord, Alemi, Tucker: On variational bounds of mutual information
        (2019): with a datum's own density in the mixture it is a lower bound, at most log N.
        Lucas, Tucker, Grosse, Norouzi: Don't blame the ELBO! (2019): the threshold.
    """
    x, mask = as_data_and_mask(x, mask, model=model, guide=guide)
    num_samples = check_int("num_samples", num_samples)
    rows = torch.arange(len(x)) if rows is None else rows
    if len(rows) < 2:
        raise ValueError(f"mutual information needs at least 2 rows of x; there is {len(rows)}")
    with isolated_store(), seeded(seed), eval_mode(model, guide):
        blocks = coded(model, guide, x, mask, rows.to(x.device), num_samples)
        parts = [(block.names(), *block.per_datum(len(rows))) for block in blocks]
    (names, *_), (_, *columns) = parts[0], zip(*parts, strict=True)
    kls, means, noise, *each, first, second = (torch.cat(column) for column in columns)
    seen = x[rows] if mask is None else torch.where(mask[rows], x[rows], math.nan)
    mean, variance = first.mean(0), second.mean(0) - first.mean(0).square()
    return Collapse(
        names,
        kls.mean(0),
        means.var(0, correction=0) - noise.mean(0),
        *each,
        moments=float(0.5 * (variance + mean.square() - 1 - variance.log()).sum()),
        spectrum=_spectrum(model, seen, len(names), noise_variance),
        num_samples=num_samples,
    )


def _spectrum(
    model: ProgramLike, x: Tensor, latent_dim: int, variance: float | None
) -> Spectrum | None:
    owner, relative = bound_object(model), False
    if variance is None:
        variance, x, relative = own_noise(owner, x)
    ppca = owner if isinstance(owner, PPCA) and bool(x.isnan().any()) else None
    if variance is None or (ppca is None and bool(x.isnan().any())):
        return None
    found = spectrum(x, latent_dim, {"model": variance}, ppca=ppca)
    return replace(found, standardized=relative)
