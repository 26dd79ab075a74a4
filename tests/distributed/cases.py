"""What the processes of the tests run: functions of the rows of one process or of a whole table."""

import torch

from ppl_vae import PPCA, fit_closed_form, fit_em, variational_em
from ppl_vae.core.processes import Processes

FITS = {"closed form": fit_closed_form, "EM": fit_em, "variational EM": variational_em}


def state(program):
    return {name: value.detach().clone() for name, value in program.state_dict().items()}


def own_rows(x, cuts):
    """The rows of x between the cuts that belong to this rank, or equal shares."""
    processes = Processes.current()
    if cuts is None:
        return x[processes.share(len(x))]
    if processes.size == 1:
        return x
    ends = [0, *cuts, len(x)]
    return x[ends[processes.rank] : ends[processes.rank + 1]]


def linear_fit(kind, x, cuts=None, latent_dim=2, noise="isotropic", **options):
    rows = own_rows(x, cuts)
    ppca = PPCA.like(rows, latent_dim, noise=noise, seed=0)
    result = FITS[kind](ppca, rows, **options)
    return state(ppca), result.objective, result.notes, result.converged


def linear_fit_kw(kind, x, cuts, options):
    return linear_fit(kind, x, cuts, **options)
