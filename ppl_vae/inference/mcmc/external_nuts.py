"""Chains of the sampler of the package nutpie, for the density that Pyro's NUTS samples."""

import importlib.util
import itertools
from typing import Any

import numpy as np
import torch

from ppl_vae.inference.mcmc.hamiltonian import (
    Chains,
    DensityAndGradient,
    IterationCallback,
    Starts,
    run_chains,
)
from ppl_vae.inference.mcmc.settings import ChainSettings

SITE = "position"


def run_nutpie_chains(
    density: DensityAndGradient,
    starts: Starts,
    settings: ChainSettings,
    after_iteration: IterationCallback,
) -> Chains:
    """Run nutpie's NUTS from each start in turn; arguments and result are those of
    :func:`~ppl_vae.inference.mcmc.hamiltonian.run_chains`.

    Raises:
        ModuleNotFoundError: if nutpie is not installed.

    References:
        Seyboldt, Carlson, Carpenter: Preconditioning Hamiltonian Monte Carlo by minimizing Fisher
        divergence (2026).
    """
    if importlib.util.find_spec("nutpie") is None:
        raise ModuleNotFoundError(
            "sampler='nutpie' needs the package nutpie; run pip install 'ppl_vae[mcmc]', or use "
            "sampler='nuts'"
        )
    import nutpie  # pyright: ignore[reportMissingImports]

    trace: Any = nutpie.sample(
        _compiled(density, starts, after_iteration),
        draws=settings.num_samples,
        tune=settings.warmup,
        chains=len(starts),
        cores=1,
        seed=int(torch.randint(2**31, ())),
        progress_bar=False,
        save_warmup=False,
    )
    positions = torch.from_numpy(np.array(trace["posterior"][SITE]))
    statistics = trace["sample_stats"]
    return Chains(
        positions.to(starts),
        int(np.sum(statistics["diverging"])),
        float(np.mean(statistics["mean_tree_accept"])),
    )


def _compiled(
    density: DensityAndGradient, starts: Starts, after_iteration: IterationCallback
) -> Any:
    # The density as nutpie calls it, with arrays in place of tensors.
    from nutpie.compiled_pyfunc import from_pyfunc  # pyright: ignore[reportMissingImports]

    size, last = starts.shape[1], [float("nan")]
    next_start, steps = itertools.cycle(starts.numpy(force=True)), itertools.count(1)

    def log_p(position: np.ndarray) -> tuple[float, np.ndarray]:
        try:
            value, gradient = density(torch.from_numpy(np.array(position)).to(starts))
        except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
            # Far out, where rounding leaves a matrix that is not positive definite.
            return float("nan"), np.zeros(size)
        last[0] = float(value)
        return last[0], gradient.numpy(force=True)

    def expand(position: np.ndarray) -> dict[str, np.ndarray]:
        after_iteration(next(steps), last[0])
        return {SITE: np.array(position)}

    return from_pyfunc(
        ndim=size,
        make_logp_fn=lambda: log_p,
        make_expand_fn=lambda *_: expand,
        make_initial_point_fn=lambda _: next(next_start).copy(),
        expanded_dtypes=[np.dtype("float64")],
        expanded_shapes=[(size,)],
        expanded_names=[SITE],
    )


RUNNERS = {"nuts": run_chains, "nutpie": run_nutpie_chains}
"""The samplers of a density of one real vector, by name."""
NAMES = {"nuts": "NUTS", "nutpie": "NUTS of nutpie"}
