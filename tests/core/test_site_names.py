"""Names and attributes that would change what is sampled: refused by name."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from torch import nn

from ppl_vae.guides.guides import AmortizedGuide
from ppl_vae.inference.svi.fit import fit_svi
from ppl_vae.likelihoods.gaussian import Gaussian
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.vae import VAE
from ppl_vae.objectives.bounds import elbo, log_weights

D, K = 5, 2
PRIOR = PyroSample(dist.Normal(0.0, 1.0).expand([D, K]).to_event(2))


@pytest.fixture
def x():
    return torch.randn(9, D, generator=torch.Generator().manual_seed(0))


# PyroSample


@pytest.mark.parametrize("name", ["loadings", "loc", "noise_scale"])
def test_parameters_of_a_program_are_not_random(name, x):
    ppca = PPCA(D, K, seed=0)
    before = ppca.log_likelihood(x)
    match = (
        f"PPCA.{name} may not be a PyroSample: .* drawn for each row separately.*Keep it a parame"
    )
    with pytest.raises(ValueError, match=match):
        setattr(ppca, name, PRIOR)
    assert torch.equal(ppca.log_likelihood(x), before)


def bayesian_decoder():
    decoder = PyroModule[nn.Linear](K, D)
    decoder.weight = PRIOR
    return decoder


def test_a_decoder_or_an_encoder_with_a_random_weight():
    with pytest.raises(ValueError, match=r"VAE\.decoder\.weight may not be a PyroSample"):
        VAE(
            decoder=bayesian_decoder(),
            encoder=nn.Linear(D, 2 * K),
            likelihood=Gaussian(1.0),
            data_dim=D,
            latent_dim=K,
        )
    nested = nn.Sequential(bayesian_decoder(), nn.Tanh())
    with pytest.raises(ValueError, match=r"AmortizedGuide.encoder.0.weight may not be a PyroSamp"):
        AmortizedGuide(nested, K)


def test_a_weight_that_became_random_later(x):
    vae = VAE.mlp(D, K, hidden=(4,), seed=0)
    elbo(vae.model, vae.guide, x)
    to_pyro_module_(vae.decoder)
    vae.decoder[0].weight = PyroSample(dist.Normal(0.0, 1.0).expand([4, K]).to_event(2))
    for use in (elbo, log_weights, lambda *pair: fit_svi(*pair, steps=2)):
        with pytest.raises(ValueError, match=r"VAE.decoder.0.weight may not be a PyroSample"):
            use(vae.model, vae.guide, x)


def test_a_latent_variable_of_anothers_module_may_be_one(x):
    """Read inside the plate, it has a value per datum, as it should."""

    class Other(PyroModule):
        @PyroSample
        def z(self):
            return dist.Normal(torch.zeros(K), 1.0).to_event(1)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                mean = self.z @ torch.ones(K, D)
                pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(K), 1.0).to_event(1))

    assert log_weights(Other(), guide, x).shape == (1, 9)


# A parameter and a site of one name


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(K), 1.0).to_event(1))
        W = pyro.param("W", torch.ones(K, D))
        pyro.sample("x", dist.Normal(z @ W, 1.0).to_event(1), obs=x)


def model_of_two(x):
    with pyro.plate("data", len(x)):
        z = pyro.param("z", torch.zeros(K))
        z = pyro.sample("z", dist.Normal(z, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).expand([9, D]).to_event(1))


def guide_of_two(x):
    loc = pyro.param("z", torch.zeros(K))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))


def guide_of_one(x):
    pyro.param("z", torch.zeros(len(x), K))


def good_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(pyro.param("W_loc", torch.zeros(K)), 1.0).to_event(1))


ONE_PROGRAM = "'z' is the name of a pyro.param and of a pyro.sample in one program.*'z_loc'"
CASES = {
    "guide": (model, guide_of_two, ONE_PROGRAM),
    "model": (model_of_two, good_guide, ONE_PROGRAM),
    "across": (
        model,
        guide_of_one,
        "'z' is a pyro.param in the guide and a pyro.sample in the mod",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_parameter_and_a_site_of_one_name(name, x):
    first, second, match = CASES[name]
    for use in (elbo, log_weights, lambda *pair: fit_svi(*pair, steps=2)):
        pyro.clear_param_store()
        with pytest.raises(ValueError, match=match):
            use(first, second, x)
    pyro.clear_param_store()
    assert fit_svi(model, good_guide, x, steps=2).steps == 2
    pyro.clear_param_store()
