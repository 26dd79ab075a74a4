"""VAEs, likelihoods and networks."""

import copy
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import draws
from ppl_vae.guides.families import COVARIANCES, num_scale_outputs
from ppl_vae.guides.guides import AmortizedGuide, ExactGuide, PerDatumGuide
from ppl_vae.likelihoods.discrete import Bernoulli
from ppl_vae.likelihoods.gaussian import Gaussian
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.vae import VAE
from ppl_vae.networks.mlp_conv import ACTIVATIONS, last_linear, mlp, zero_output
from ppl_vae.objectives.bounds import log_weights

D, K, N = 6, 2, 10


draw = partial(draws.draw, dtype=torch.float32)


def vae_with(**changes):
    parts = {
        "decoder": mlp(K, D, seed=0),
        "encoder": mlp(D, 2 * K, seed=1),
        "likelihood": Gaussian(0.5),
        "data_dim": D,
        "latent_dim": K,
    }
    return VAE(**(parts | changes))


# The pair


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("likelihood", [None, Gaussian(0.3), Bernoulli()])
def test_a_vae_is_a_pair(likelihood, covariance):
    likelihood = copy.deepcopy(likelihood)
    vae = VAE.mlp(D, K, hidden=(5, 4), likelihood=likelihood, covariance=covariance, seed=0)
    x = (draw(N, D) > 0).float()
    guide = poutine.trace(vae.guide).get_trace(x)
    model = poutine.trace(poutine.replay(vae.model, trace=guide)).get_trace(x)
    assert guide.nodes["z"]["value"].shape == (N, K)
    assert (model.nodes["x"]["fn"].batch_shape, model.nodes["x"]["fn"].event_shape) == ((N,), (D,))
    assert model.nodes["x"]["is_observed"]
    assert log_weights(vae.model, vae.guide, x, 3, seed=0).shape == (3, N)


def test_prior_and_posterior_predictive_draws():
    vae = VAE.mlp(D, K, seed=0)
    assert vae.model(num_data=4).shape == (4, D)
    x = draw(N, D)
    assert vae.model(x) is x or torch.equal(vae.model(x), x)
    assert not torch.equal(vae.model(x, observe=False), x)


def test_networks_are_public_attributes():
    encoder, decoder = mlp(D, 2 * K), mlp(K, D)
    vae = vae_with(encoder=encoder, decoder=decoder)
    assert vae.guide.encoder is encoder
    assert vae.decoder is decoder
    names = {name for name, _ in vae.named_parameters()}
    assert {"decoder.0.weight", "guide.encoder.0.bias"} <= names


def test_the_log_joint_is_the_sum_of_its_terms():
    vae, x = vae_with().double(), draw(N, D, dtype=torch.float64)
    torch.manual_seed(0)
    guide = poutine.trace(vae.guide).get_trace(x)
    model = poutine.trace(poutine.replay(vae.model, trace=guide)).get_trace(x)
    z = guide.nodes["z"]["value"]
    loc, raw = vae.guide.encoder(x).chunk(2, -1)
    log_q = dist.Normal(loc, (0.5 * raw).exp()).log_prob(z).sum()
    log_p = dist.Normal(vae.decoder(z), 0.5).log_prob(x).sum()
    log_p = log_p + dist.Normal(0.0, 1.0).log_prob(z).sum()
    torch.testing.assert_close(guide.log_prob_sum(), log_q)
    torch.testing.assert_close(model.log_prob_sum(), log_p)


def test_a_linear_vae_is_ppca():
    ppca = PPCA(D, K, seed=3).double().assign(noise_scale=0.5, loc=draw(D, seed=1).double())
    decoder = nn.Linear(K, D).double()
    with torch.no_grad():
        decoder.weight.copy_(ppca.loadings)
        decoder.bias.copy_(ppca.loc)
    vae = vae_with(decoder=decoder).double()
    x = draw(N, D, dtype=torch.float64)
    torch.testing.assert_close(
        log_weights(vae.model, vae.guide, x, 4, seed=0),
        log_weights(ppca.model, vae.guide, x, 4, seed=0),
        rtol=0,
        atol=1e-10,
    )


class Watched(nn.Module):
    """A network that records the shapes it was called with."""

    def __init__(self, network):
        super().__init__()
        self.network, self.shapes = network, []

    def forward(self, rows):
        self.shapes.append(tuple(rows.shape))
        return self.network(rows)


def test_networks_are_given_rows_for_any_number_of_samples():
    decoder, encoder = Watched(mlp(K, D)), Watched(mlp(D, 2 * K))
    vae = vae_with(decoder=decoder, encoder=encoder)
    log_weights(vae.model, vae.guide, draw(N, D), 7)
    assert (7 * N, K) in decoder.shapes
    assert {len(shape) for shape in decoder.shapes + encoder.shapes} == {2}
    assert set(encoder.shapes) == {(N, D)}


def test_a_convolutional_decoder_runs_under_a_plate_of_samples():
    decoder = nn.Sequential(
        nn.Unflatten(1, (K, 1, 1)), nn.ConvTranspose2d(K, 3, 2), nn.ReLU(),
        nn.ConvTranspose2d(3, 1, 2), nn.Flatten(),
    )  # fmt: skip
    vae = vae_with(decoder=decoder, data_dim=9, encoder=mlp(9, 2 * K))
    assert log_weights(vae.model, vae.guide, draw(N, 9), 5).shape == (5, N)


@pytest.mark.parametrize(
    "guide",
    [lambda: AmortizedGuide(mlp(D, 2 * K, seed=1), K), lambda: PerDatumGuide(N, K)],
    ids=["amortized", "mean field"],
)
def test_a_vae_accepts_any_guide(guide):
    vae = vae_with(encoder=None, guide=guide())
    x = draw(N, D)
    assert log_weights(vae.model, vae.guide, x, 2).shape == (2, N)
    torch.testing.assert_close(vae.reconstruct(x), vae.decode(vae.guide.distribution(x).mean).mean)


def test_a_vae_accepts_a_function_as_guide():
    def guide(x, **_):
        with pyro.plate("data", len(x)):
            return pyro.sample("z", dist.Normal(x[:, :K], 0.1).to_event(1))

    vae, x = vae_with(encoder=None, guide=guide), draw(N, D)
    assert log_weights(vae.model, vae.guide, x, 2).shape == (2, N)
    torch.testing.assert_close(vae.reconstruct(x), vae.decode(x[:, :K]).mean)


def test_decoding_and_reconstruction_are_means_of_the_likelihood():
    vae, x = vae_with(likelihood=Bernoulli()), draw(N, D)
    z = draw(3, N, K, seed=2)
    decoded = vae.decode(z)
    assert (decoded.batch_shape, decoded.event_shape) == ((3, N), (D,))
    torch.testing.assert_close(decoded.mean, torch.sigmoid(vae.decoder(z)))
    mean = vae.guide.encoder(x)[:, :K]
    torch.testing.assert_close(vae.reconstruct(x), torch.sigmoid(vae.decoder(mean)))
    torch.testing.assert_close(vae.reconstruct(x.numpy()), vae.reconstruct(x))


@pytest.mark.parametrize("missing", ["zeros", "zeros+mask"])
def test_rows_with_missing_values_are_reconstructed_completely(missing):
    vae = VAE.mlp(D, K, missing=missing, seed=0)
    mask = draw(N, D, seed=2) < 1
    x = torch.where(mask, draw(N, D), torch.nan)
    inputs = torch.where(mask, x, 0.0)
    inputs = torch.cat([inputs, mask.float()], 1) if missing == "zeros+mask" else inputs
    expected = vae.decode(vae.guide.encoder(inputs)[:, :K]).mean
    torch.testing.assert_close(vae.reconstruct(x), expected)
    junk = torch.where(mask, x, 1e6).numpy()
    assert torch.equal(vae.reconstruct(junk, mask=mask.numpy()), vae.reconstruct(x))
    whole = vae.decode(vae.guide.distribution(draw(N, D)).mean).mean
    torch.testing.assert_close(vae.reconstruct(draw(N, D)), whole)
    mask[3] = False
    nothing = vae.reconstruct(torch.full((1, D), torch.nan))
    torch.testing.assert_close(vae.reconstruct(junk, mask=mask)[3:4], nothing)


def test_missing_values_are_encoded_as_stated():
    with pytest.raises(
        ValueError, match=r"missing must be one of 'zeros', 'zeros.mask'; got 'nan'"
    ):
        VAE.mlp(D, K, missing="nan")
    with pytest.raises(ValueError, match="missing must be one of"):
        vae_with(missing="nan")
    vae = vae_with(encoder=mlp(2 * D, 2 * K), missing="zeros+mask")
    assert vae.guide.distribution(draw(N, D)).mean.shape == (N, K)


def test_samples_follow_the_model():
    vae = vae_with(likelihood=Bernoulli())
    x = vae.sample(50, seed=0)
    assert x.shape == (50, D)
    assert set(x.unique().tolist()) == {0.0, 1.0}
    with pytest.raises(ValueError, match="num_samples must be a whole number >= 1; got 0"):
        vae.sample(0)


def test_double_precision_is_kept_throughout():
    vae = VAE.mlp(D, K, seed=0).double()
    x = draw(N, D)
    assert vae.sample(2).dtype == torch.float64
    assert vae.reconstruct(x).dtype == torch.float64
    assert vae.model(x).dtype == torch.float64
    assert log_weights(vae.model, vae.guide, x).dtype == torch.float64


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"hidden": (3,), "activation": "tanh", "covariance": "full"},
        {"hidden": (), "missing": "zeros+mask"},
    ],
)
def test_a_vae_can_be_made_from_its_config(arguments):
    vae = VAE.mlp(D, K, **arguments, seed=0)
    again = VAE.mlp(**vae.config())
    again.load_state_dict(vae.state_dict())
    x = draw(N, D)
    first, second = (log_weights(v.model, v.guide, x, 2, seed=0) for v in (vae, again))
    assert torch.equal(first, second)


def test_a_vae_prints_as_the_call_that_made_it():
    vae = VAE.mlp(6, 2, hidden=(3,), likelihood=Gaussian(0.3))
    assert repr(vae) == (
        "VAE.mlp(data_dim=6, latent_dim=2, hidden=(3,), "
        "likelihood=Gaussian(scale=0.3, initial=1.0, floor=0.0001), "
        'activation="relu", covariance="diagonal", missing="zeros", inputs="auto")'
    )
    assert repr(vae.guide) == (
        'AmortizedGuide(encoder=Sequential(...), latent_dim=2, covariance="diagonal", '
        'homoscedastic=False, missing="zeros")'
    )
    assert repr(ExactGuide(PPCA(4, 2), covariance="unit")) == (
        'ExactGuide(model=PPCA(data_dim=4, latent_dim=2, noise="isotropic"), covariance="unit")'
    )


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"encoder": None}, "give exactly one of encoder and guide"),
        ({"guide": PerDatumGuide(N, K)}, "give exactly one of encoder and guide"),
        (
            {"encoder": None, "guide": PerDatumGuide(N, K + 1)},
            f"the guide has latent_dim={K + 1}, the model {K}",
        ),
        ({"latent_dim": 0}, "latent_dim must be a whole number >= 1; got 0"),
        ({"data_dim": 0}, "data_dim must be a whole number >= 1; got 0"),
    ],
)
def test_incompatible_parts_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        vae_with(**changes)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((0, K), "data_dim must be|width must be"),
        ((D, 0), "latent_dim must be a whole number >= 1; got 0"),
    ],
)
def test_an_mlp_vae_needs_dimensions(arguments, match):
    with pytest.raises(ValueError, match=match):
        VAE.mlp(*arguments)


@pytest.mark.parametrize(
    ("part", "network", "match"),
    [
        ("decoder", nn.Linear(K, D + 1), rf"must return \(rows, {D}\).*\({N}, {D + 1}\)"),
        ("encoder", nn.Linear(D, K), rf"the encoder must return \(rows, {2 * K}\).*\({N}, {K}\)"),
    ],
)
def test_networks_of_the_wrong_width_are_refused(part, network, match):
    vae = vae_with(**{part: network})
    with pytest.raises(ValueError, match=match):
        log_weights(vae.model, vae.guide, draw(N, D))


def test_data_of_another_width_are_refused():
    vae = vae_with()
    for call, where in ((vae.model, "here"), (vae.reconstruct, "for this model")):
        with pytest.raises(ValueError, match=rf"x must have shape \(rows, {D}\) {where}"):
            call(draw(N, D + 1))


def test_the_support_is_checked_by_the_likelihood():
    vae = vae_with(likelihood=Bernoulli())
    with pytest.raises(ValueError, match=r"x has 1 entries outside \{0, 1\}"):
        vae.check_data(torch.tensor([[0.0, 1.0, 0.5]]))
    vae.check_data(torch.tensor([[0.0, 1.0, 0.5]]), torch.tensor([[True, True, False]]))
    assert vae.notes() == []


# Networks


@pytest.mark.parametrize("hidden", [(), (5,), (5, 3, 4)])
def test_the_widths_of_an_mlp(hidden):
    network = mlp(D, K, hidden, seed=0)
    layers = [layer for layer in network if isinstance(layer, nn.Linear)]
    assert [layer.in_features for layer in layers] == [D, *hidden]
    assert [layer.out_features for layer in layers] == [*hidden, K]
    assert last_linear(network) is layers[-1] is network[-1]
    assert network(draw(N, D)).shape == (N, K)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_known_by_name(activation):
    network = mlp(D, K, (4,), activation=activation)
    assert isinstance(network[1], type(ACTIVATIONS[activation]()))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"activation": "swish"}, "activation must be one of 'relu', 'tanh'.*got 'swish'"),
        ({"hidden": (0,)}, "width must be a whole number >= 1; got 0"),
        ({"in_dim": 0}, "width must be a whole number >= 1; got 0"),
    ],
)
def test_invalid_networks_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        mlp(**({"in_dim": D, "out_dim": K} | arguments))


def test_a_network_can_start_as_a_constant():
    network = zero_output(mlp(D, K, (5,), seed=0))
    assert not network(draw(N, D)).any()
    assert network[0].weight.any()
    with pytest.raises(TypeError, match="the network must end in a Linear layer, not ReLU"):
        last_linear(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))


def test_the_encoder_of_an_mlp_vae_has_the_width_its_guide_needs():
    for covariance in COVARIANCES:
        vae = VAE.mlp(D, K, hidden=(5, 4), covariance=covariance)
        assert last_linear(vae.guide.encoder).out_features == K + num_scale_outputs(covariance, K)
        linear = [layer for layer in vae.decoder if isinstance(layer, nn.Linear)]
        assert [layer.in_features for layer in linear] == [K, 4, 5]
