"""The terms of the ELBO per draw: of each datum, and of the variables that all data share."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.traces import PairTraces, global_sites, log_prob, per_draw
from ppl_vae.objectives.divergences import global_kl_terms, kl_terms


@dataclass(frozen=True)
class ELBOTerms:
    """The terms of the ELBO of draws (theta_s, z_s1, ..., z_sB), in nats.

    With N data, of which B are in the batch, the ELBO is the mean over draws of

        N/B sum_n [log p(x_n | z_n, theta) - KL(q(z_n | x_n, theta) || p(z_n | theta))]
        - KL(q(theta) || p(theta)),

    each KL in closed form, or estimated by the draw. S is 1 where terms do not depend on draws.

    Attributes:
        reconstruction: log p(x_n | z_sn, theta_s).
        kl: the KL divergence of the local latent variables of each datum.
        global_log_prob: the log density of observed global sites, given the latent ones.
        global_kl: the KL divergence of the global latent variables.
        num_data: N.
    """

    num_data: int
    reconstruction: Float[Tensor, "#S B"]
    kl: Float[Tensor, "#S B"]
    global_log_prob: Float[Tensor, "#S"]
    global_kl: Float[Tensor, "#S"]

    @classmethod
    def of(cls, run: PairTraces, *, closed: bool) -> "ELBOTerms":
        """The terms of a run, with KLs in closed form where they are known if ``closed``.

        Raises:
            ValueError: if the model observes nothing.
        """
        if not run.observed:
            raise ValueError("the model observes nothing; pass its data on as obs=x")
        observed = [run.per_datum(site, log_prob(site)) for site in run.observed.values()]
        kl = kl_terms(run, closed=closed) or [torch.zeros_like(part) for part in observed]
        global_observed = [s for s in global_sites(run.model).values() if s["is_observed"]]
        zero = observed[0].new_zeros(1)
        return cls(
            num_data=run.num_data,
            reconstruction=_total(observed),
            kl=_total(kl),
            global_log_prob=_total(
                [zero, *(per_draw(site, log_prob(site)) for site in global_observed)]
            ),
            global_kl=_total([zero, *global_kl_terms(run, closed=closed)]),
        )

    def mean(self, beta: float | Tensor = 1.0) -> Float[Tensor, ""]:
        """The ELBO in nats per datum, its KLs weighted by beta."""
        return self.local(beta).mean() + self.global_terms(beta).mean()

    def local(self, beta: float | Tensor = 1.0) -> Float[Tensor, "#S B"]:
        """The terms of each datum, the KL weighted by beta."""
        return self.reconstruction - beta * self.kl

    def means(self, global_kl: bool) -> Float[Tensor, "#B"]:
        """The ELBO of each datum, with or without the terms of the global variables."""
        return self.local().mean(0) + (self.global_terms().mean() if global_kl else 0.0)

    def global_terms(self, beta: float | Tensor = 1.0) -> Float[Tensor, "#S"]:
        """The terms of the global variables per datum, the KL weighted by beta."""
        return (self.global_log_prob - beta * self.global_kl) / self.num_data


def _total(terms: list[Tensor]) -> Tensor:
    if len(terms) == 1:
        return terms[0]
    return torch.stack(torch.broadcast_tensors(*terms)).sum(0)


def check_whole(num_rows: int, num_data: int) -> int:
    """The number of data, all of which must be in the batch.

    Raises:
        ValueError: if the batch is smaller.
    """
    if num_rows != num_data:
        raise ValueError(
            f"IWAE with global latent variables weighs draws of all {num_data} data points "
            "jointly, and "
            f"this batch has {num_rows}; pass all rows at once (batch_size=None in fit_svi), or "
            "use ELBO(num_samples), which minibatches estimate without bias"
        )
    return num_data
