"""Objectives read from any pair's traces: log weights, ELBO, IWAE.

With log w_sn = log p(x_n, z_sn) - log q(z_sn | x_n), the mean over S is the ELBO, the log of the
mean of the exponentials the importance-weighted bound, and other objectives are functions of
these. All are in nats per datum, unscaled; only a training loss sums them over the data.

Global latent variables theta, outside the plate over data, add E_q[log p(theta) - log q(theta)]
once, for any size of a batch; per datum this is divided by N. Log weights are then those of
z_sn given theta_s.
"""

import math
from contextlib import ExitStack
from functools import partial
from typing import Any

import pyro.infer
import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.arrays.frame_labels import Frame
from ppl_vae.core.arrays.inputs import labels_of
from ppl_vae.core.batch import Batch
from ppl_vae.core.introspection import bound_object
from ppl_vae.core.nonfinite import check_no_nan
from ppl_vae.core.pair import Pair
from ppl_vae.core.processes.divided_rows import DividedRows
from ppl_vae.core.processes.ranks import Processes
from ppl_vae.core.program import ProgramLike
from ppl_vae.core.state import isolated_store, seeded
from ppl_vae.core.traces import PairTraces, sites
from ppl_vae.core.validation import ArrayLike, check_int, check_option
from ppl_vae.data.sources.observed_rows import closed_after_use, observe_rows
from ppl_vae.data.sources.row_stream import describe_rows
from ppl_vae.objectives.divergences import floored_kl
from ppl_vae.objectives.gradients import (
    DetachedSamples,
    check_reparameterized,
    doubly_reparameterized,
    replace_gradient,
    score_function,
    sticking_the_landing,
)
from ppl_vae.objectives.terms import ELBOTerms, check_whole


def log_weights(
    model: ProgramLike,
    guide: ProgramLike,
    x: ArrayLike,
    num_samples: int = 1,
    *,
    mask: ArrayLike | None = None,
    index: Tensor | None = None,
    num_data: int | None = None,
    seed: int | None = None,
) -> Float[Tensor, "S N"]:
    """log p(x_n, z_sn) - log q(z_sn | x_n) for draws z_sn of the guide, in nats.

    Args:
        model, guide: any pair under the contract.
        x: data, (N, D).
        num_samples: draws per datum, S.
        mask: True where x is observed; NaN in x marks a missing value, too.
        index: which rows of the whole data x holds, for guides with per-datum parameters.
        num_data: the size of the whole data.
        seed: the seed of the draws.

    Returns:
        (S, N), differentiable in the pair's parameters. With global latent variables theta these
        are log p(x_n, z_sn | theta_s) - log q(z_sn | x_n, theta_s), with draws theta_s of the
        guide that all data share.

    Raises:
        ValueError: what :func:`ppl_vae.core.traces.check_pair` refuses, and bad data.
    """
    num_samples = check_int("num_samples", num_samples)
    pair = Pair(model, guide)
    whole = pair.observe(x, mask, allow_empty_rows=True)
    batch = Batch(whole.x, whole.mask, index, num_data)
    with isolated_store(), seeded(seed):
        dim = pair.sample_dim(batch) if num_samples > 1 else None
        return pair.run(batch, num_samples=num_samples, dim=dim).log_weights()


@torch.no_grad()
def elbo(
    model: ProgramLike,
    guide: ProgramLike,
    x: ArrayLike,
    *,
    num_samples: int = 1,
    mask: ArrayLike | None = None,
    batch_size: int = 4096,
    global_kl: bool = True,
    seed: int | None = None,
) -> Float[Tensor, " N"] | Frame:
    """The ELBO (beta = 1) of each datum, in nats, its KL in closed form where possible.

    With global latent variables theta, it is E_q(theta) of the ELBO of the datum given theta, less
    KL(q(theta) || p(theta)) / N: the sum over the data is a lower bound on log p(x_1, ..., x_N).
    An empty row has minus its KL. A data frame gives a series.

    Args:
        model, guide: any pair under the contract; run in evaluation mode.
        x, mask: the whole data, (N, D), in memory or read in blocks, and True where observed.
        num_samples: draws per datum.
        batch_size: rows at once; each batch has draws of theta of its own.
        global_kl: whether to subtract the last term; without it each ELBO is a lower bound on the
            posterior predictive log density, as is right for data that theta was not fitted to.
        seed: the seed of the draws.

    Raises:
        FloatingPointError: if a value is NaN, naming the site and the rows.
    """
    with ExitStack() as stack:
        with Processes.current().together():
            pair, objective, values = Pair(model, guide), ELBO(num_samples), []
            observed = observe_rows(
                x, mask, model=model, guide=guide, allow_empty_rows=True, check=False
            )
            whole = stack.enter_context(closed_after_use(observed, x))
        describe, row_indices = partial(describe_rows, whole), torch.arange(len(whole))
        settings = f"{num_samples=}, {global_kl=}"
        rows = DividedRows.of("elbo", pair, describe, row_indices, seed, settings=settings)
        with rows.processes.together(), isolated_store(), rows.seeded(), pair.train_mode(False):
            for batch in whole.split(rows.own, check_int("batch_size", batch_size)):
                run = objective._run(pair, batch)
                values.append(objective.terms_of(run).means(global_kl).expand(len(batch)))
                check_no_nan("the ELBO", values[-1], run, batch)
    return labels_of(x).rows(rows.gather(torch.cat(values)), "elbo")


PLAIN = "reparameterized"
SCORES = ("score", "score-loo")


class _Objective(pyro.infer.ELBO):
    """Abstract: a ``pyro.infer.ELBO`` whose value is a reduction of unscaled terms per datum."""

    def __init__(self, num_samples: int, gradient: str, known: tuple[str, ...]) -> None:
        super().__init__(num_particles=check_int("num_samples", num_samples))
        self.gradient = check_option("gradient", gradient, known)
        self._pairs: dict[tuple[Any, ...], tuple[Any, Pair]] = {}

    def mean_value(
        self, model: ProgramLike, guide: ProgramLike, x: Tensor, **keywords: Any
    ) -> tuple[Float[Tensor, ""], int]:
        """The objective in nats per datum, and the size of the whole data."""
        return self.value_of(self._pair(model, guide), Batch.of(x, keywords))

    def value_of(self, pair: Pair, batch: Batch) -> tuple[Float[Tensor, ""], int]:
        """:meth:`mean_value` of a pair on a batch."""
        if self.gradient == PLAIN or not torch.is_grad_enabled():
            run = self._run(pair, batch)
            return self._value(run, None), run.num_data
        with DetachedSamples() as draws:
            run = self._run(pair, batch, by_score=self.gradient in SCORES)
        return self._value(run, draws if sites(run.guide) else None), run.num_data

    def _value(self, run: PairTraces, draws: DetachedSamples | None) -> Float[Tensor, ""]:
        """The objective in nats per datum, with the estimator's gradient if draws are given."""
        raise NotImplementedError

    def differentiable_loss(
        self, model: ProgramLike, guide: ProgramLike, x: Tensor, **keywords: Any
    ) -> Tensor:
        """Minus the objective, summed over the whole data (as Pyro's losses are)."""
        mean, num_data = self.mean_value(model, guide, x, **keywords)
        return -mean * num_data

    def loss(self, model: ProgramLike, guide: ProgramLike, *args: Any, **kwargs: Any) -> float:
        """The value of :meth:`differentiable_loss`, without its gradient."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(
        self, model: ProgramLike, guide: ProgramLike, *args: Any, **kwargs: Any
    ) -> float:
        """The value of :meth:`differentiable_loss`; its gradient is added to the parameters'."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return loss.item()

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("traces are read by ppl_vae.core.pair.Pair.run")

    def _run(self, pair: Pair, batch: Batch, *, by_score: bool = False) -> PairTraces:
        dim = pair.sample_dim(batch) if self.num_particles > 1 else None
        run = pair.run(batch, num_samples=self.num_particles, dim=dim)
        if torch.is_grad_enabled() and not by_score:
            check_reparameterized(run)
        return run

    def _pair(self, model: ProgramLike, guide: ProgramLike) -> Pair:
        # pyro.infer.SVI passes the programs in each step; facts about them are found once.
        owners = [bound_object(program) for program in (model, guide)]
        names = [getattr(program, "__name__", "") for program in (model, guide)]
        key = (*map(id, owners), *names)
        if key not in self._pairs:
            # The owners are kept, so that no other object can have their ids.
            self._pairs[key] = owners, Pair(model, guide)
        return self._pairs[key][1]


class ELBO(_Objective):
    """The evidence lower bound, E_q[log p(x | z)] - beta KL(q || p), a ``pyro.infer.ELBO``.

    The KL is closed-form where it is known and the sites' order shows that it may be used (as in
    ``TraceMeanField_ELBO``), else estimated from the draws. Without latent variables it is 0, and
    the bound is log p(x). The KL of global latent variables is subtracted once for all data.

    Args:
        num_samples: draws per datum.
        beta: weight of the KL (Higgins et al.: beta-VAE, 2017), that of global latent variables
            included; 1 is the bound.
        kl: ``"auto"`` (closed-form where possible) or ``"sampled"``.
        free_bits: a floor, in nats per latent dimension, of the batch mean of the KL: below it
            the KL costs its floor and has no gradient (Kingma et al.: Improved variational
            inference with inverse autoregressive flow, 2016). Needs a KL that is a sum over
            dimensions, so no full covariance. Global latent variables have no floor.
        gradient: how its gradient is estimated, see :mod:`ppl_vae.objectives.gradients`; the means
            agree.

            ``"reparameterized"``: through the draws, which every site must allow.
            ``"stl"``: the same less the guide's score, whose mean is zero (sticking the landing);
            at the exact posterior no noise is left. The KL is estimated from the draws.
            ``"score"``: by the guide's score, log q's gradient weighted by what is averaged;
            not through the draws, so for sites without a reparameterized gradient, too.
            ``"score-loo"``: the same, the mean of the datum's other draws taken off the weight.
    """

    def __init__(
        self,
        num_samples: int = 1,
        beta: float = 1.0,
        kl: str = "auto",
        free_bits: float = 0.0,
        gradient: str = PLAIN,
    ) -> None:
        super().__init__(num_samples, gradient, (PLAIN, "stl", *SCORES))
        if beta < 0 or free_bits < 0:
            raise ValueError(f"beta and free_bits must be >= 0; got {beta} and {free_bits}")
        self.beta = beta
        self.kl = check_option("kl", kl, ("auto", "sampled"))
        self.free_bits = free_bits
        if free_bits and gradient != PLAIN:
            raise ValueError(
                f"free_bits is a floor on the KL's mean over a batch, and gradient={gradient!r} "
                f"needs a value per datum; use gradient={PLAIN!r}, or free_bits=0"
            )
        if gradient == "score-loo" and num_samples < 2:
            raise ValueError(
                "gradient='score-loo' needs a datum's other draws: num_samples must be >= 2; "
                "use gradient='score'"
            )

    def __repr__(self) -> str:
        return (
            f"ELBO(num_samples={self.num_particles}, beta={self.beta}, "
            f"kl={self.kl!r}, free_bits={self.free_bits}, gradient={self.gradient!r})"
        )

    def terms(
        self, model: ProgramLike, guide: ProgramLike, x: Tensor, **keywords: Any
    ) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """E_q[log p(x | z)] and KL(q || p) per datum, in nats, averaged over the draws.

        Those of global latent variables are not among them.
        """
        terms = self.terms_of(self._run(self._pair(model, guide), Batch.of(x, keywords)))
        return terms.reconstruction.mean(0), terms.kl.mean(0)

    def terms_of(self, run: PairTraces) -> ELBOTerms:
        """The terms of a run, per draw."""
        return ELBOTerms.of(run, closed=self.kl == "auto" and self.gradient != "stl")

    def _value(self, run: PairTraces, draws: DetachedSamples | None) -> Float[Tensor, ""]:
        terms = self.terms_of(run)
        if self.free_bits and run.latent:
            cost = floored_kl(run, self.free_bits, closed=self.kl == "auto")
            global_part = terms.global_terms(self.beta).mean()
            return terms.reconstruction.mean() - self.beta * cost + global_part
        value = terms.mean(self.beta)
        if draws is None:
            return value
        if self.gradient == "stl":
            log_q = draws.log_q(run).mean() + draws.global_log_q(run).mean() / terms.num_data
            source = sticking_the_landing(value, log_q, draws, self.beta)
        else:
            source = self._score(terms, run, draws)
        return replace_gradient(value, source)

    def _score(
        self, terms: ELBOTerms, run: PairTraces, draws: DetachedSamples
    ) -> Float[Tensor, ""]:
        local, of_theta = terms.local(self.beta), terms.global_terms(self.beta)
        leave_one_out = self.gradient == "score-loo"
        source = score_function(local, draws.log_q(run), leave_one_out=leave_one_out)
        if not run.global_latent:
            return source + of_theta.mean()
        # The terms of all data depend on a draw of global variables.
        every, log_q = local.mean(1) + of_theta, draws.global_log_q(run)
        return source + score_function(of_theta, log_q, leave_one_out=leave_one_out, signal=every)


class IWAE(_Objective):
    """The importance-weighted bound, E log (1/S sum_s w_s), a ``pyro.infer.ELBO``.

    Weights are reduced per datum and unscaled, so that it is a bound on minibatches, too. S = 1 is
    the ELBO; it tightens with S.

    With global latent variables theta, w_s = p(x_1, ..., x_N, z_s1, ..., z_sN, theta_s) /
    q(z_s1, ..., z_sN, theta_s) is the weight of all data together, which a minibatch does not
    determine: all rows must be passed at once. The bound is divided by N.

    Args:
        num_samples: S.
        gradient: the estimator of its gradient. ``"reparameterized"``: through the draws,
            E[sum_s v_s d log w_s] with the normalised weights v_s = w_s / sum_t w_t; the
            guide's part has a signal-to-noise ratio that falls with S. ``"dreg"``: doubly
            reparameterized (Tucker et al. 2019), whose ratio rises with S, see
            :func:`ppl_vae.objectives.gradients.doubly_reparameterized`. The means agree.

    References:
        Burda, Grosse, Salakhutdinov: Importance Weighted Autoencoders (2016); Rainforth et al.:
        Tighter variational bounds are not necessarily better (2018), for the noise of the
        gradient.
    """

    def __init__(self, num_samples: int = 8, gradient: str = PLAIN) -> None:
        super().__init__(num_samples, gradient, (PLAIN, "dreg"))

    def __repr__(self) -> str:
        return f"IWAE(num_samples={self.num_particles}, gradient={self.gradient!r})"

    def _value(self, run: PairTraces, draws: DetachedSamples | None) -> Float[Tensor, ""]:
        log_weights, log_q = run.log_weights(), None if draws is None else draws.log_q(run)
        joint = 1
        if run.global_latent:
            joint = check_whole(log_weights.shape[1], run.num_data)
            log_weights = (log_weights.sum(1) + run.global_log_weights())[:, None]
            if draws is not None and log_q is not None:
                log_q = (log_q.expand(-1, joint).sum(1) + draws.global_log_q(run))[:, None]
        bound = (torch.logsumexp(log_weights, 0) - math.log(self.num_particles)).mean() / joint
        if draws is None or log_q is None:
            return bound
        return replace_gradient(bound, doubly_reparameterized(log_weights, log_q, draws) / joint)
