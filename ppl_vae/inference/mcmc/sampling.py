"""Draws from the posterior of the parameters of a model, by the sampler that suits it."""

import inspect
from dataclasses import replace

from ppl_vae.core.processes.ranks import Processes
from ppl_vae.core.program import ProgramLike
from ppl_vae.core.validation import ArrayLike, check_int, check_option
from ppl_vae.data.sources.row_blocks import RowSource
from ppl_vae.inference.mcmc.gibbs import sample_gibbs
from ppl_vae.inference.mcmc.nuts import sample_nuts
from ppl_vae.inference.mcmc.program_nuts import sample_program
from ppl_vae.inference.mcmc.samples import PosteriorSamples
from ppl_vae.inference.mcmc.settings import ChainSettings
from ppl_vae.inference.svi.progress import ProgressCallback
from ppl_vae.models.bayesian_ppca import BayesianPPCA

SAMPLERS = ("auto", "gibbs", "nuts", "nutpie")


def sample_posterior(
    model: ProgramLike,
    x: RowSource,
    *,
    mask: ArrayLike | None = None,
    num_samples: int = 1000,
    warmup: int = 1000,
    chains: int = 4,
    sampler: str = "auto",
    seed: int | None = None,
    progress: bool | str | ProgressCallback = "auto",
) -> PosteriorSamples:
    """Draw from the posterior of a model's parameters by Markov chain Monte Carlo.

    ``"gibbs"`` samples :class:`~ppl_vae.models.bayesian_ppca.BayesianPPCA` under conjugate priors
    from the sufficient statistics of the data: a sweep over complete data takes the same time for
    any number of rows, after one pass over them. ``"nuts"`` is the No-U-Turn sampler of Pyro, for
    any priors and for any other program with continuous latent variables; ``"nutpie"`` is that of
    the package nutpie. ``"auto"`` is ``"gibbs"`` where it applies, else ``"nuts"``.

    Args:
        model: a ``BayesianPPCA``, or the model of any other pair.
        x: a matrix; for Gibbs sampling also a memory map or an iterable of blocks of rows. NaN
            marks a missing value.
        mask: True where observed.
        num_samples: draws of each chain, S.
        warmup: iterations of each chain before these.
        chains: the number of chains, which start at different points.
        sampler: ``"auto"``, ``"gibbs"``, ``"nuts"`` or ``"nutpie"``.
        seed: seed of the draws.
        progress: ``"auto"`` shows a bar if standard error is a terminal; a callable is called with
            the number of iterations and log p(x) per datum instead of it.

    Raises:
        ValueError: if an argument is out of range; if ``sampler="gibbs"`` and the model is no
            ``BayesianPPCA`` with conjugate priors; as the samplers.
    """
    check_int("num_samples", num_samples, 4)
    settings = ChainSettings(num_samples, warmup, chains, seed, progress)
    ppca = _ppca(model)
    chosen, reason = _choose(check_option("sampler", sampler, SAMPLERS), model, ppca)
    if chosen == "gibbs":
        assert ppca is not None
        return sample_gibbs(ppca, x, mask, settings)
    if ppca is None:
        _check_single()
        samples = sample_program(model, x, mask, settings, sampler=chosen)
    else:
        samples = sample_nuts(ppca, x, mask, settings, sampler=chosen)
    return replace(samples, notes=(*samples.notes, *reason))


def _check_single() -> None:
    if (size := Processes.current().size) > 1:
        raise ValueError(
            f"sample_posterior shares the rows of a BayesianPPCA among the {size} processes of "
            "torch.distributed, and not those of other models; let one process work alone: with "
            "ppl_vae.core.single_process()"
        )


def _ppca(model: ProgramLike) -> BayesianPPCA | None:
    # The model itself or that of its method ``model``; under a handler it is another program.
    owner = getattr(model, "__self__", None) if inspect.ismethod(model) else model
    return owner if isinstance(owner, BayesianPPCA) else None


def _choose(
    sampler: str, model: ProgramLike, ppca: BayesianPPCA | None
) -> tuple[str, tuple[str, ...]]:
    # The sampler, and a note on the reason if a default was not taken.
    if sampler == "gibbs" and ppca is None:
        raise ValueError(
            "sampler='gibbs' needs a BayesianPPCA, whose conditional distributions are known; got "
            f"{type(model).__name__}. Use sampler='nuts', which takes any program with continuous "
            "latent variables"
        )
    if sampler != "auto":
        return sampler, ()
    wrong = () if ppca is None else ppca.not_conjugate()
    if ppca is not None and not wrong:
        return "gibbs", ()
    reason = f"sampled by NUTS, because priors are not conjugate: {', '.join(wrong)}"
    return "nuts", (reason,) if wrong else ()
