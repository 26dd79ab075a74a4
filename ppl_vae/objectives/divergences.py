"""The KL divergence of a site, in closed form where it is known, in total or per dimension.

Point masses and flat priors have no normalised density, and so no KL divergence and no importance
weights: :func:`check_densities` refuses them.
"""

from collections.abc import Callable, Mapping

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import kl_divergence

from ppl_vae.core.batch import Batch
from ppl_vae.core.pair import Pair
from ppl_vae.core.program import DATA_PLATE, Density
from ppl_vae.core.stacked_draws import StackedDraws
from ppl_vae.core.traces import (
    SAMPLE_PLATE,
    PairTraces,
    Site,
    global_sites,
    log_prob,
    masked,
    per_draw,
    plates_of,
    sites,
)


def same_order(run: PairTraces) -> bool:
    """Whether model and guide sample their latent sites, global ones included, in the same order.

    Then no site's parents in the model descend from it in the guide, and the closed-form KL of
    each site, conditional on those before it, is unbiased.
    """
    latent = [name for name, site in sites(run.model).items() if not site["is_observed"]]
    return latent == [name for name in sites(run.guide) if name in latent]


def closed_kl(guide_site: Site, model_site: Site) -> Tensor | None:
    """KL(q || p) of a site in closed form, batch-shaped and unmasked; None if it is not known."""
    if guide_site["mask"] is not model_site["mask"]:
        return None
    q, p = guide_site["fn"], model_site["fn"]
    try:
        if isinstance(q, StackedDraws):
            return q.pairwise(p, _closed_kl)
        return _closed_kl(q, p)
    except NotImplementedError:
        return None


def _closed_kl(q: Density, p: Density) -> Tensor:
    if is_delta(q):
        raise NotImplementedError("a KL would drop the log density that a Delta may carry")
    if isinstance(q, dist.MultivariateNormal) and _is_diagonal(p):
        return _kl_full_diagonal(q, p)
    return kl_divergence(q, p)


def kl_terms(run: PairTraces, *, closed: bool = True) -> list[Float[Tensor, "S B"]]:
    """KL(q || p) per draw and datum as a list of terms whose sum it is, in nats.

    Each local site's term is in closed form where that is known and the order of the sites allows
    it, and is estimated from the draws elsewhere. Terms that do not depend on the draws have
    S = 1; without local latent variables the list is empty.
    """
    return _kl_terms(run, run.drawn, run.latent, run.per_datum, closed)


def global_kl_terms(run: PairTraces, *, closed: bool = True) -> list[Float[Tensor, "#S"]]:
    """KL(q || p) of the global variables per draw, as :func:`kl_terms`."""
    return _kl_terms(run, global_sites(run.guide), run.global_latent, per_draw, closed)


def _kl_terms(
    run: PairTraces,
    drawn: Mapping[str, Site],
    latent: Mapping[str, Site],
    reduced: Callable[[Site, Tensor], Tensor],
    closed: bool,
) -> list[Tensor]:
    closed = closed and same_order(run)
    terms = []
    for name, guide_site in drawn.items():
        model_site = latent.get(name)
        value = closed_kl(guide_site, model_site) if closed and model_site else None
        if value is not None:
            terms.append(reduced(guide_site, masked(value, guide_site["mask"])))
            continue
        terms.append(reduced(guide_site, log_prob(guide_site)))
        if model_site:
            terms.append(-reduced(model_site, log_prob(model_site)))
    return terms


def is_delta(q: Density) -> bool:
    """Whether a distribution is a point mass; it may carry a log density, as a flow's last site
    does."""
    if isinstance(q, StackedDraws):
        return is_delta(q.parts[0])
    while isinstance(q, dist.Independent | dist.MaskedDistribution):
        q = q.base_dist
    return isinstance(q, dist.Delta)


def check_densities(run: PairTraces, way_out: str = "use a guide with a scale") -> None:
    """Check that the latent sites have normalised densities.

    A flat prior has none, and neither has a point mass in the guide. (A point made from auxiliary
    sites, as the last site of a flow, has the density of these.) The joint density of auxiliary
    and latent sites is not the density of the latent ones either.

    Args:
        run: traces of a pair.
        way_out: what the message advises for a point mass.

    Raises:
        ValueError: naming the site without a density.
    """
    for name, site in run.latent.items():
        if is_improper(site["fn"]):
            raise ValueError(
                f"site {name!r} of the model has a flat prior, which is no density: there is no "
                "marginal likelihood log p(x), and no KL from it. elbo(model, guide, x) is minus "
                "the loss of such an autoencoder; take prior='laplace' or a VAE for log p(x)"
            )
    _check_auxiliary(run)
    transformed = any(site["infer"].get("is_auxiliary") for site in run.drawn.values())
    for name in run.latent:
        if is_delta(run.drawn[name]["fn"]) and not transformed:
            raise ValueError(
                f"site {name!r} of the guide is a Delta: a point mass has no density, so its KL, "
                f"mutual information and importance weights are not defined; {way_out}"
            )


def check_importance_samplable(pair: Pair, batch: Batch) -> None:
    """Check that the log weights of a pair on a batch are importance weights.

    Raises:
        ValueError: if the model's prior is improper, or the guide is a point mass; as
            :func:`ppl_vae.core.traces.check_pair`.
    """
    check_densities(
        pair.inspect(batch),
        "use a guide with a scale, or log_likelihood(model, None, x, method='annealed'), which "
        "needs no guide",
    )


def _check_auxiliary(run: PairTraces) -> None:
    auxiliary = sorted(run.drawn.keys() - run.latent.keys())
    if auxiliary and not any(is_delta(run.drawn[name]["fn"]) for name in run.latent):
        raise ValueError(
            f"the guide draws auxiliary sites, {auxiliary}, and the model scores none of them: "
            "q(z | x) is then a mixture over them, whose density is not known, and p(x, z) over "
            "the joint density of both is no weight. Sample them in the model too, from an "
            "auxiliary distribution r(a | z, x) of your choice under the same names"
        )


def check_latents(run: PairTraces) -> None:
    """Check that there are latent sites and that they have densities: :func:`check_densities`.

    Raises:
        ValueError: if there are none, or one has no density.
    """
    if not run.latent and run.global_latent:
        raise ValueError(
            "the model has no latent variables of each datum, so there are no codes, no gap and "
            f"nothing to refine or anneal: {sorted(run.global_latent)} are shared by all data"
        )
    if not run.latent:
        raise ValueError(
            "the model has no latent variables, so there are no codes, no gap and "
            "nothing to refine or anneal: elbo(model, guide, x) is log p itself, exactly"
        )
    check_densities(run)


def is_improper(p: Density) -> bool:
    """Whether a distribution is improper: flat over all of its support."""
    while isinstance(p, dist.Independent | dist.MaskedDistribution):
        p = p.base_dist
    return isinstance(p, dist.ImproperUniform)


def _is_diagonal(p: Density) -> bool:
    return (
        isinstance(p, dist.Independent)
        and p.reinterpreted_batch_ndims == 1
        and isinstance(p.base_dist, dist.Normal)
    )


def _kl_full_diagonal(q: dist.MultivariateNormal, p: dist.Independent) -> Tensor:
    """KL(N(m, L L') || N(m0, diag(s^2))).

    It is 1/2 sum_k [(|L_k|^2 + (m - m0)_k^2) / s_k^2 - 1] - sum_k log L_kk / s_k.
    """
    loc, scale, tril = p.base_dist.loc, p.base_dist.scale, q.scale_tril
    second_moment = (tril.square().sum(-1) + (q.loc - loc).square()) / scale.square()
    log_ratio = tril.diagonal(dim1=-2, dim2=-1).log() - scale.log()
    return (0.5 * (second_moment - 1) - log_ratio).sum(-1)


def floored_kl(run: PairTraces, floor: float, *, closed: bool = True) -> Tensor:
    """Sum over latent dimensions of max(floor, mean KL over data and draws).

    Raises:
        ValueError: if the KL is not a sum over the dimensions of the model's latent sites.
    """
    if auxiliary := sorted(run.drawn.keys() - run.latent.keys()):
        raise ValueError(
            f"free_bits needs a KL that is a sum over latent dimensions, and the guide's "
            f"auxiliary sites {auxiliary} are not latent dimensions of the model; use free_bits=0"
        )
    by_name = [site_kl_by_dimension(run, name, closed=closed) for name in run.latent]
    return torch.cat(by_name).clamp(min=floor).sum()


def site_kl_by_dimension(
    run: PairTraces, name: str, *, marginal: bool = False, closed: bool = True
) -> Float[Tensor, " K"]:
    """KL(q || p) of each dimension of a latent site, averaged over draws and data, in nats.

    It is in closed form where that is known and the order of the sites allows it, and estimated
    from the draws elsewhere. Dimensions of an inner plate and of an event both count.

    Args:
        run: traces of the pair.
        name: the name of the site.
        closed: take the closed form where there is one.
        marginal: use the marginals of a Gaussian with a full covariance. Their KL divergences add
            up to less than its KL; the difference is the dependence between its dimensions.

    Raises:
        ValueError: if q or p is not a product over dimensions.
    """
    site = run.drawn[name]
    q, p = site["fn"], run.latent[name]["fn"]
    if marginal and isinstance(q, dist.MultivariateNormal):
        q = dist.Normal(q.mean, q.variance.sqrt()).to_event(1)
    while isinstance(q, dist.Independent) and isinstance(p, dist.Independent):
        q, p = q.base_dist, p.base_dist
    if q.event_shape or p.event_shape:
        raise ValueError(
            f"free_bits needs a KL that is a sum over latent dimensions, and so has a KL a "
            f"dimension; site {name!r} has a {type(q).__name__} guide. Use covariance='diagonal'"
        )
    try:
        known = closed and same_order(run)
        kl = kl_divergence(q, p) if known else _sampled(q, p, site["value"])
    except NotImplementedError:
        kl = _sampled(q, p, site["value"])
    event = len(site["fn"].event_shape)
    shape = site["fn"].batch_shape + site["fn"].event_shape
    kl = kl.expand(torch.broadcast_shapes(kl.shape, shape))
    kl = masked(kl, _over_event(site["mask"], event))
    plates = plates_of(site)
    averaged = [plates[n].dim - event for n in (SAMPLE_PLATE, DATA_PLATE) if n in plates]
    return kl.mean([dim for dim in averaged if -dim <= kl.dim()]).flatten()


def _sampled(q: Density, p: Density, value: Tensor) -> Tensor:
    return q.log_prob(value) - p.log_prob(value)


def _over_event(mask: Tensor | bool | None, event: int) -> Tensor | bool | None:
    return mask[(..., *[None] * event)] if isinstance(mask, Tensor) else mask
