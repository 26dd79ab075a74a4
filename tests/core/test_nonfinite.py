"""A network that gives NaN, or a scale that is none, for some rows: site and rows are named."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from ppl_vae.core.batch import Batch
from ppl_vae.core.nonfinite import name_rows
from ppl_vae.core.state import validation
from ppl_vae.evaluation.inference_gaps.gaps import gaps
from ppl_vae.evaluation.latent_space.collapse import collapse
from ppl_vae.evaluation.marginal_likelihood.importance import log_likelihood
from ppl_vae.evaluation.prediction.imputation import impute
from ppl_vae.inference.svi.fit import fit_svi
from ppl_vae.likelihoods.gaussian import Gaussian
from ppl_vae.models.vae import VAE
from ppl_vae.objectives.bounds import elbo, log_weights

N, D, K, ROW = 30, 4, 2, 7


class Network(nn.Module):
    """A linear map whose result is ``value`` for rows that begin with a large number."""

    def __init__(self, in_dim, out_dim, value=torch.nan):
        super().__init__()
        self.linear, self.value = nn.Linear(in_dim, out_dim), value

    def forward(self, x):
        return torch.where(x[..., :1] > 100, self.value, self.linear(x))


@pytest.fixture
def x():
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    x[ROW, 0] = 200.0
    x[ROW, 1] = torch.nan  # so that the row is imputed
    return x


def vae(encoder=None, decoder=None):
    torch.manual_seed(0)
    return VAE(
        decoder=decoder or nn.Linear(K, D),
        encoder=encoder or Network(D, 2 * K),
        likelihood=Gaussian(),
        data_dim=D,
        latent_dim=K,
    )


ENTRIES = {
    "fit": lambda pair, x: fit_svi(*pair, x, steps=3, seed=0),
    "log weights": lambda pair, x: log_weights(*pair, x, 3, seed=0),
    "elbo": lambda pair, x: elbo(*pair, x, seed=0),
    "elbo in batches": lambda pair, x: elbo(*pair, x, batch_size=4, seed=0),
    "log-likelihood": lambda pair, x: log_likelihood(*pair, x, num_samples=5, seed=0),
    "rows": lambda pair, x: log_likelihood(
        *pair, x, num_samples=5, rows=torch.tensor([9, 3, ROW]), seed=0
    ),
    "refined": lambda pair, x: log_likelihood(*pair, x, num_samples=5, refine=2, seed=0),
    "gaps": lambda pair, x: gaps(*pair, x, seed=0),
    "imputation": lambda pair, x: impute(*pair, x, num_samples=9, seed=0),
    "collapse": lambda pair, x: collapse(*pair, x, seed=0),
    "features": lambda pair, x: pair[0].__self__.features(x),
    "reconstruction": lambda pair, x: pair[0].__self__.reconstruct(x),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_the_site_and_the_row_are_named(name, x):
    model = vae()
    before = torch.get_rng_state()
    with pytest.raises(
        ValueError,
        match=r"site 'z' of the guide has a parameter 'loc' that is NaN in row 7;",
    ):
        ENTRIES[name]((model.model, model.guide), x)
    assert torch.equal(before, torch.get_rng_state())


def test_a_minibatch_names_the_row_of_the_whole_data(x):
    model = vae()
    with pytest.raises(
        (ValueError, FloatingPointError), match=r"site 'z' of the guide.* in row 7"
    ):
        fit_svi(model.model, model.guide, x.roll(20, 0).roll(-20, 0), epochs=2, batch_size=5)


def test_validation_rows_are_named(x):
    model = vae()
    with pytest.raises(ValueError, match=r"x_val: site 'z' of the guide .* in row 2;"):
        fit_svi(model.model, model.guide, x[:5], x_val=x[5:9], steps=3, seed=0)


def test_validation_rows_that_fail_later_stop_the_fit(x):
    class Late(nn.Module):
        """Fails for one row once its parameters have moved."""

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(D, 2 * K)
            self.initial = self.linear.bias.detach().clone()

        def forward(self, x):
            moved = (self.linear.bias != self.initial).any() & torch.tensor(len(x) == 3)
            wrong = (x[..., :1] > 100) & moved
            return torch.where(wrong, torch.nan, self.linear(x))

    model = vae(encoder=Late())
    with pytest.raises(
        FloatingPointError,
        match=r"x_val after step 25: the ELBO is NaN in row 1: site 'z' of the guide",
    ):
        fit_svi(model.model, model.guide, x[:5], x_val=x[6:9], steps=50, seed=0, capture=False)
    assert all(p.isfinite().all() for p in model.parameters())


def test_without_checks_of_arguments_the_site_and_the_row_are_named(x):
    model = vae()
    with (
        validation(False),
        pytest.raises(FloatingPointError, match=r"site 'z' of the guide .* is NaN in row 7;"),
    ):
        log_likelihood(model.model, model.guide, x, num_samples=5, seed=0)


def test_without_checks_of_arguments_the_elbo_names_the_site_and_the_row(x):
    model = vae()
    with (
        validation(False),
        pytest.raises(
            FloatingPointError, match=r"ELBO is NaN in row 7: site 'z' of the guide .* in row 7"
        ),
    ):
        elbo(model.model, model.guide, x, batch_size=5, seed=0)


def user_pair(decoder, encoder, scale=0.5):
    """A pair with a plate over features inside the plate over data."""

    def model(x, index=None, num_data=None):
        pyro.module("decoder", decoder)
        with pyro.plate("data", num_data or len(x), subsample=torch.arange(len(x)), dim=-2):
            with pyro.plate("codes", K, dim=-1):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("features", D, dim=-1):
                pyro.sample("x", dist.Normal(decoder(z), 1.0), obs=x)

    def guide(x, index=None, num_data=None):
        pyro.module("encoder", encoder)
        rows = pyro.plate("data", num_data or len(x), subsample=torch.arange(len(x)), dim=-2)
        with rows, pyro.plate("codes", K, dim=-1):
            pyro.sample("z", dist.Normal(encoder(x), scale))

    return model, guide


def test_sites_under_several_plates_are_named(x):
    x = x.nan_to_num(0.0)
    pair = user_pair(nn.Linear(K, D), Network(D, K))
    with pytest.raises(
        ValueError, match=r"site 'z' of the guide has a parameter 'loc'.* in row 7;"
    ):
        elbo(*pair, x, seed=0)
    pair = user_pair(Network(K, D), Network(D, K, value=1e4))
    with pytest.raises(
        ValueError, match=r"site 'x' of the model has a parameter 'loc'.* in row 7;"
    ):
        elbo(*pair, x, seed=0)


def test_a_scale_that_is_out_of_range_is_named(x):
    pair = user_pair(nn.Linear(K, D), nn.Linear(D, K), scale=-torch.ones(()))
    with pytest.raises(
        ValueError,
        match=r"site 'z' of the guide has a parameter 'scale' out of range in all 30 rows;",
    ):
        elbo(*pair, x.nan_to_num(0.0), seed=0)


def test_a_diverging_step_names_the_site(x):
    model = vae(encoder=nn.Linear(D, 2 * K))
    with pytest.raises(FloatingPointError, match=r"not finite at step \d+: site '.' of the "):
        fit_svi(model.model, model.guide, x, steps=200, lr=1e6, seed=0, capture=False)


def test_many_rows_are_counted():
    wrong = torch.arange(40) % 4 == 1
    batch = Batch(torch.zeros(40, 2))
    assert name_rows(wrong, batch) == "rows 1, 5, 9, 13, 17 and 5 others"
    assert name_rows(wrong, Batch(torch.zeros(40, 2), index=100 + torch.arange(40))).startswith(
        "rows 101, 105"
    )
