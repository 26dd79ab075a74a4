"""What the processes of the tests run on their own rows of a table."""

from ppl_vae import PPCA, fit_closed_form, fit_em, variational_em
from ppl_vae.core.processes.messages import record_messages
from ppl_vae.core.processes.ranks import Processes
from ppl_vae.inference import fit_vb, sample_posterior
from ppl_vae.models import BayesianPPCA
from ppl_vae.models.linear import sufficient_statistics

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


def bayesian(x, cuts=None, noise="isotropic"):
    rows = own_rows(x, cuts)
    model = BayesianPPCA.like(rows, 2, noise=noise, prior="ard")
    found = fit_vb(model, rows, seed=0, max_iterations=20)
    draws = sample_posterior(
        model, rows, num_samples=8, warmup=4, chains=2, seed=0, progress=False
    )
    return state(model), found.objective, found.loadings, draws.draws, found.notes


def unseeded_draws(x):
    rows = own_rows(x, None)
    model = BayesianPPCA.like(rows, 2)
    samples = sample_posterior(model, rows, num_samples=8, warmup=4, chains=2, progress=False)
    return samples.draws


def small_products_only(x):
    """The closed form with the scatter matrix itself in place of a factor."""
    before = sufficient_statistics.MAX_QR_COST
    sufficient_statistics.MAX_QR_COST = 0.0
    try:
        return linear_fit("closed form", x)
    finally:
        sufficient_statistics.MAX_QR_COST = before


def messages_of(kind, x, options):
    with record_messages() as log:
        linear_fit(kind, x, None, **options)
    return dict(log.counts)


def fit_of_rank(arguments):
    """A fit whose arguments differ between ranks: kind, rows, options."""
    kind, x, options = arguments
    rows = x
    ppca = PPCA(7, 2, seed=0).double()
    return FITS[kind](ppca, rows, **options).steps
