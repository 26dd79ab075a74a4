"""Multilayer perceptrons, and convolutional pairs for flat rows of images of any size."""

from functools import partial

import numpy as np
import pytest
import torch
from pyro.infer import Predictive
from torch import nn

import draws
from captured import assert_equal, both_fits
from ppl_vae import VAE, Bernoulli, Gaussian, fit_svi, load, log_likelihood, log_weights, mlp, save
from ppl_vae.networks.mlp_conv import Bias, conv_decoder, conv_encoder

SHAPES = [(1, 28, 28), (1, 8, 8), (3, 5, 3), (1, 1, 7), (2, 9, 4)]


draw = partial(draws.draw, dtype=torch.float32)


def test_one_hidden_layer_equals_its_formula():
    z = draw(7, 3).double()
    network = mlp(3, 5, (4,), seed=0).double()
    (a1, b1, a2, b2) = (p.detach().numpy() for p in network.parameters())
    expected = np.maximum(z.numpy() @ a1.T + b1, 0) @ a2.T + b2
    assert (a1.shape, a2.shape) == ((4, 3), (5, 4))
    assert np.abs(network(z).detach().numpy() - expected).max() < 1e-14


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channels", [(4,), (3, 5), (2, 3, 4)])
def test_images_of_any_size_keep_their_size(shape, channels):
    width = int(np.prod(shape))
    encoder = conv_encoder(shape, 6, channels, seed=0)
    decoder = conv_decoder(6, shape, channels[::-1], outputs_per_dim=2, seed=0)
    codes = encoder(draw(4, width))
    assert codes.shape == (4, 6)
    assert decoder(codes).shape == (4, 2 * width)
    made = [part for part in decoder if isinstance(part, nn.ConvTranspose2d)]
    assert [part.in_channels for part in made] == list(channels[::-1])


@pytest.mark.parametrize("shape", SHAPES)
def test_every_entry_affects_the_code_and_is_affected_by_it(shape):
    # A gradient that is zero somewhere would be a pixel that no weight sees.
    width = int(np.prod(shape))
    x = draw(1, width).double().requires_grad_()
    conv_encoder(shape, 3, (4, 4), activation="tanh", seed=0).double()(x).sum().backward()
    assert (x.grad != 0).all()
    decoder = conv_decoder(3, shape, (4, 4), activation="tanh", outputs_per_dim=2, seed=0).double()
    z = draw(1, 3).double()
    jacobian = torch.autograd.functional.jacobian(decoder, z).reshape(2 * width, 3)
    assert (jacobian != 0).any(1).all()


def test_outputs_of_an_entry_are_adjacent():
    # Of one channel and one output each, the outputs of the two are images of their own.
    one = conv_decoder(3, (2, 4, 6), (5,), outputs_per_dim=3, seed=0)
    images = nn.Sequential(*one[:-2])(draw(7, 3))
    assert images.shape == (7, 6, 4, 6)
    rows = one(draw(7, 3)).reshape(7, 2, 4, 6, 3)
    for output in range(3):
        assert torch.equal(rows[..., output], images[:, 2 * output : 2 * output + 2])


def test_rows_are_ordered_by_channel_row_and_column():
    # Shifting an image by two pixels shifts what one convolution of stride 2 gives by one.
    encoder = conv_encoder((2, 12, 12), 3, (4,), seed=0)
    image = torch.zeros(1, 2, 12, 12)
    image[0, 1, 4:6, 4:6] = draw(2, 2)
    first, shifted = (encoder[:2](i.flatten(1)) for i in (image, image.roll((2, 2), (2, 3))))
    assert torch.allclose(first.roll((1, 1), (2, 3)), shifted, atol=1e-6)


def test_the_last_layer_has_one_bias_per_output():
    decoder = conv_decoder(3, (1, 4, 4), (5,), seed=0)
    z, before = draw(2, 3), decoder(draw(2, 3)).detach()
    assert isinstance(decoder[-1], Bias)
    with torch.no_grad():
        decoder[-1].bias.copy_(torch.arange(16.0))
    assert torch.allclose(decoder(z) - before, torch.arange(16.0).expand(2, 16), atol=1e-5)


@pytest.mark.parametrize(
    "likelihood",
    [Gaussian, Bernoulli, lambda: Gaussian("network")],
    ids=["shared", "binary", "two"],
)
@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_fitting_and_evaluating_a_convolutional_pair(likelihood, covariance):
    vae = VAE.conv(
        (1, 7, 5), 2, channels=(4, 6), likelihood=likelihood(), covariance=covariance, seed=0
    )
    x = (draw(30, 35) > 0).float()
    assert log_weights(vae.model, vae.guide, x, 3, seed=0).shape == (3, 30)
    before = [p.detach().clone() for p in vae.decoder.parameters()]
    fit = fit_svi(vae.model, vae.guide, x, steps=5, batch_size=10, lr=1e-2, seed=0)
    assert fit.steps == 5 and fit.objective.isfinite().all()
    moved = zip(before, vae.decoder.parameters(), strict=True)
    assert all(not torch.equal(b, p) for b, p in moved)
    assert log_likelihood(vae.model, vae.guide, x[:4], 30, seed=0).value.isfinite().all()
    assert vae.sample(3, seed=0).shape == (3, 35) and vae.reconstruct(x).shape == (30, 35)
    again = Predictive(vae.model, guide=vae.guide, num_samples=3)(x, observe=False)["x"]
    assert again.shape == (3, 30, 35)
    together = Predictive(vae.model, num_samples=3, parallel=True)(num_data=4)["x"]
    assert together.shape == (3, 4, 35)


def test_a_convolutional_pair_improves_in_training():
    # A bright square at one of nine places: the codes must say where.
    x = torch.zeros(9, 1, 6, 6)
    for place in range(9):
        row, column = divmod(place, 3)
        x[place, 0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = 1
    x = x.flatten(1)
    likelihood = Gaussian("shared", initial=0.1)
    vae = VAE.conv((1, 6, 6), 2, channels=(16,), likelihood=likelihood, seed=0)
    fit_svi(vae.model, vae.guide, x, steps=200, lr=2e-2, capture=False, seed=0)
    assert (vae.reconstruct(x) - x).square().mean().sqrt() < 0.15  # 0.31 without codes


@pytest.mark.parametrize("missing", ["zeros", "zeros+mask"])
def test_convolutional_encoders_with_missing_values(missing):
    vae = VAE.conv((1, 6, 6), 2, channels=(4,), missing=missing, seed=0).double()
    x = draw(8, 36).double()
    x[x > 1] = torch.nan
    weights = log_weights(vae.model, vae.guide, x, 2, seed=0)
    junk = torch.where(x.isnan(), 1e3, x)
    again = log_weights(vae.model, vae.guide, junk, 2, mask=~x.isnan(), seed=0)
    assert weights.isfinite().all() and torch.equal(weights, again)
    # The mask is a second image: entry d of it stands in channel 1 at the place of entry d.
    assert vae.guide.encoder[1].in_channels == {"zeros": 1, "zeros+mask": 2}[missing]


def test_captured_steps_of_a_convolutional_pair_equal_eager_steps():
    def make():
        vae = VAE.conv((1, 4, 5), 2, channels=(3, 4), seed=0).double()
        return vae.model, vae.guide

    assert_equal(both_fits(make, draw(24, 20).double()))


@pytest.mark.parametrize("arguments", [{}, {"missing": "zeros+mask", "covariance": "full"}])
def test_saving_and_loading_a_convolutional_pair(arguments, tmp_path):
    likelihood = Gaussian("shared", initial=0.7, floor=1e-3)
    made = {"channels": (3, 4), "activation": "elu", "likelihood": likelihood}
    vae = VAE.conv((2, 5, 4), 3, **made, **arguments, seed=1).double()
    loaded = load(save(vae, tmp_path))
    x = draw(6, 40).double()
    first, second = (log_weights(v.model, v.guide, x, 2, seed=0) for v in (vae, loaded))
    assert torch.equal(first, second)
    assert loaded.config() == vae.config() and loaded.likelihood.floor == 1e-3


def test_a_seed_reproduces_the_networks():
    state, again, other = (VAE.conv((1, 4, 4), 2, seed=s).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert not torch.equal(state["decoder.0.weight"], other["decoder.0.weight"])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"image_shape": (28, 28)}, r"image_shape must be \(channels, height, width\); got"),
        ({"image_shape": (1, 0, 28)}, "image_shape must be a whole number >= 1; got 0"),
        (
            {"channels": ()},
            "channels must have at least one entry, one per convolution; it is empty",
        ),
        ({"channels": (4, 0)}, "channels must be a whole number >= 1; got 0"),
        ({"latent_dim": 0}, "latent_dim must be a whole number >= 1; got 0"),
        ({"activation": "swish"}, "activation must be one of 'relu'"),
    ],
)
def test_invalid_shapes_raise(arguments, match):
    with pytest.raises(ValueError, match=match):
        VAE.conv(**({"image_shape": (1, 4, 4), "latent_dim": 2} | arguments))


def test_rows_of_another_size_raise():
    vae = VAE.conv((1, 4, 4), 2, seed=0)
    with pytest.raises(ValueError, match=r"x must have shape \(rows, 16\) for this model"):
        fit_svi(vae.model, vae.guide, draw(5, 15), steps=1)
