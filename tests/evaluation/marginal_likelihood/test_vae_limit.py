"""An autoencoder's networks as a VAE of fixed posterior scale, in the limit of a zero scale."""

import math
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import oracles
import pytest
import torch
from draws import draw
from figures import assert_texts_are_readable
from torch.optim.lr_scheduler import CosineAnnealingLR

from ppl_vae import (
    VAE,
    Autoencoder,
    Bernoulli,
    Gaussian,
    PerDatumGuide,
    elbo,
    fit_svi,
    load,
    log_likelihood,
    mlp,
    save,
)
from ppl_vae.evaluation import vae_limit
from ppl_vae.inference import best_codes
from ppl_vae.networks import GaussianNoise
from ppl_vae.plots import vae_limit as point_plots

N, D, K = 40, 6, 3


def make(**options):
    defaults = {"hidden": (5,), "prior": "normal", "seed": 0}
    return Autoencoder.mlp(D, K, **(defaults | options)).double()


@pytest.mark.parametrize("penalty", [None, 0.3, 20.0])
def test_a_normal_prior_is_a_squared_penalty_up_to_a_constant(penalty):
    autoencoder, x = make(penalty=penalty), draw(N, D)
    codes = autoencoder.guide.encoder(x)
    weight = 1.0 if penalty is None else penalty
    loss = 0.5 * (x - autoencoder.decoder(codes)).square().sum(1)
    loss = loss + 0.5 * weight * codes.square().sum(1)
    constant = D / 2 * math.log(2 * math.pi) + K / 2 * math.log(2 * math.pi / weight)
    found = -elbo(autoencoder.model, autoencoder.guide, x)
    torch.testing.assert_close(found, (loss + constant).detach(), rtol=1e-13, atol=1e-12)
    scale = 1 / math.sqrt(weight)
    z = autoencoder.prior().sample(torch.Size([20_000]))
    score = (z.square().mean(0) / scale**2 - 1) / math.sqrt(2 / len(z))
    assert float(score.abs().max()) < oracles.z_limit(K)
    assert autoencoder.sample(4, seed=0).shape == (4, D)


def test_best_codes_under_a_normal_prior_are_ridge_regressions():
    autoencoder = Autoencoder.linear(D, K, prior="normal", penalty=0.7, seed=0).double()
    x = draw(N, D)
    weight, bias = (p.detach().numpy() for p in autoencoder.decoder.parameters())
    gram = weight.T @ weight + 0.7 * np.eye(K)
    expected = np.linalg.solve(gram, weight.T @ (x.numpy() - bias).T).T
    found = best_codes(autoencoder, x, tolerance=1e-9)
    np.testing.assert_allclose(found.codes, expected, atol=1e-8)
    z = found.codes
    joint = autoencoder.decode(z).log_prob(x) + autoencoder.prior().log_prob(z)
    torch.testing.assert_close(found.log_joint, joint)


# The same networks as a VAE


@pytest.mark.parametrize("scale", [1.0, 0.2])
def test_the_vae_has_the_same_networks_and_its_loss_is_the_sum_of_its_terms(scale):
    autoencoder, x = make(likelihood=Gaussian(0.6)), draw(N, D)
    vae = autoencoder.as_vae(scale)
    assert isinstance(vae, VAE)
    torch.testing.assert_close(vae.features(x), autoencoder.features(x))
    with torch.no_grad():
        q = vae.guide.distribution(x)
    assert float((q.stddev - scale).abs().max()) == 0
    found = vae_limit(autoencoder, x, scales=[scale], num_samples=400, seed=0)
    exact_kl = 0.5 * (q.mean.square().sum(1) + K * (scale**2 - 1 - 2 * math.log(scale)))
    difference = found.cross_entropy - found.entropy - exact_kl.mean().detach()
    sd = math.sqrt(scale**2 * float(q.mean.square().sum(1).mean()) + K * scale**4 / 2)
    assert abs(float(difference)) < oracles.z_limit(2) * sd / math.sqrt(400 * N)
    values = -elbo(vae.model, vae.guide, x, num_samples=400, seed=1)
    # Two means over 400 draws each; the squared error's sd over draws is found from 400 more.
    with torch.no_grad():
        z = q.mean + scale * draw(400, N, K)
        spread = (x - vae.decoder(z)).square().sum(2).div(2 * 0.6**2).mean(1).std()
    limit = oracles.z_limit(2) * float(spread) * math.sqrt(2 / 400)
    assert abs(float(values.mean() - found.loss)) < limit + abs(float(difference))
    assert log_likelihood(vae.model, vae.guide, x, 50, seed=0).value.isfinite().all()


@pytest.mark.parametrize("prior", ["normal", "flat", "laplace"])
@pytest.mark.parametrize(
    "likelihood",
    [lambda: Gaussian(0.6), lambda: Bernoulli(soft_targets=True)],
    ids=["normal", "Bernoulli"],
)
def test_the_loss_converges_to_that_of_the_autoencoder(prior, likelihood):
    autoencoder = make(prior=prior, likelihood=likelihood())
    x = draw(N, D).sigmoid()
    found = vae_limit(autoencoder, x, scales=[1e-2, 1e-4, 1e-8], num_samples=20, seed=0)
    expected = -elbo(autoencoder.model, autoencoder.guide, x).mean()
    torch.testing.assert_close(found.autoencoder, expected)
    far, near, nearest = found.difference.abs().tolist()
    assert nearest < 1e-6 and near < 0.05 * far  # of first or second order in s
    torch.testing.assert_close(found.loss, found.without_entropy - found.entropy)
    width = torch.tensor([1e-2, 1e-4, 1e-8]).double()
    torch.testing.assert_close(found.entropy, torch.distributions.Normal(0.0, width).entropy() * K)
    assert "above the autoencoder" in repr(found) and "point" in repr(found)
    assert len(found.to_frame()) == 3


def test_the_excess_loss_of_a_linear_decoder_has_a_closed_form():
    autoencoder, x = Autoencoder.linear(D, K, prior="normal", seed=0).double(), draw(N, D)
    weight = autoencoder.decoder[0].weight.detach()
    draws, scale = 4000, 0.5
    found = vae_limit(autoencoder, x, scales=[scale], num_samples=draws, seed=0)
    excess = 0.5 * scale**2 * float(weight.square().sum() + K)
    # The loss has the gradient g and the Hessian W'W + I in the noise.
    z = autoencoder.features(x)
    slope = z - (x - autoencoder.reconstruct(x)) @ weight
    curve = weight.mT @ weight + torch.eye(K).double()
    variance = scale**2 * slope.square().sum(1) + scale**4 * curve.square().sum() / 2
    error = float(variance.mean()) ** 0.5 / math.sqrt(draws * N)
    assert abs(float(found.difference) - excess) < oracles.z_limit() * error


def test_with_unit_width_a_vae_is_an_autoencoder_with_noise_on_its_code():
    """The loss of both is |x - G(f(x) + eps)|^2 / 2 + |f(x)|^2 / 2 + constant."""
    vae, x = make().as_vae(), draw(N, D)
    torch.manual_seed(3)
    found = -elbo(vae.model, vae.guide, x)
    torch.manual_seed(3)
    codes = vae.guide.encoder.network(x).detach()
    eps = torch.randn(N, K, dtype=torch.float64)
    loss = 0.5 * (x - vae.decoder(codes + eps)).square().sum(1) + 0.5 * codes.square().sum(1)
    constant = D / 2 * math.log(2 * math.pi)
    torch.testing.assert_close(found, (loss + constant).detach())


@pytest.mark.slow
def test_training_with_a_vanishing_scale_equals_training_the_autoencoder():
    x = draw(200, K, seed=1) @ draw(K, D, seed=2) + 0.1 * draw(200, D)
    fit = partial(fit_svi, steps=150, lr=0.02, scheduler=CosineAnnealingLR, seed=0, capture=False)
    autoencoder, narrow = make(), make().as_vae(1e-6)
    for pair in (autoencoder, narrow):
        fit(pair.model, pair.guide, x)
    torch.testing.assert_close(
        narrow.reconstruct(x), autoencoder.reconstruct(x), atol=1e-3, rtol=0
    )
    wide = make().as_vae(1.0)
    fit(wide.model, wide.guide, x)
    assert (wide.reconstruct(x) - autoencoder.reconstruct(x)).abs().max() > 0.1


def test_the_vae_is_an_independent_copy_and_tied_networks_stay_tied(tmp_path):
    autoencoder = Autoencoder.linear(D, K, tied=True, corruption=GaussianNoise(0.1), seed=0)
    before = autoencoder.features(x := draw(N, D).float())
    vae = autoencoder.as_vae(0.3)
    assert vae.guide.corruption == GaussianNoise(0.1)
    assert len(list(vae.parameters())) == 2
    fit_svi(vae.model, vae.guide, x, steps=5, lr=0.1, capture=False, seed=0)
    assert torch.equal(autoencoder.features(x), before)
    weight, bias = (p.detach() for p in vae.decoder.parameters())
    torch.testing.assert_close(vae.features(x), (x - bias) @ weight)
    again = load(save(vae, tmp_path), into=autoencoder.as_vae(0.3))
    assert torch.equal(again.features(x), vae.features(x))


def test_missing_values_and_seeds():
    autoencoder = make()
    x = torch.where(draw(N, D, seed=1) < 1, draw(N, D), torch.nan)
    first, again = (vae_limit(autoencoder, x, scales=(0.1,), seed=3) for _ in range(2))
    assert torch.equal(first.loss, again.loss)
    expected = -elbo(autoencoder.model, autoencoder.guide, x).mean()
    torch.testing.assert_close(first.autoencoder, expected)
    state = torch.get_rng_state()
    vae_limit(autoencoder, x, scales=(0.1,), seed=3)
    assert torch.equal(state, torch.get_rng_state())


def test_bad_arguments():
    autoencoder, x = make(), draw(N, D)
    with pytest.raises(ValueError, match="scale must be positive, the standard deviation of q; g"):
        autoencoder.as_vae(0.0)
    with pytest.raises(ValueError, match="scales must hold at least one standard deviation of q"):
        vae_limit(autoencoder, x, scales=[])
    with pytest.raises(ValueError, match="num_samples must be a whole number >= 1; got 0"):
        vae_limit(autoencoder, x, num_samples=0)
    parts = {"decoder": mlp(K, D).double(), "data_dim": D, "latent_dim": K}
    own = Autoencoder(**parts, guide=PerDatumGuide(N, K, covariance="delta").double())
    with pytest.raises(TypeError, match="the guide must have an encoder, as an AmortizedGuide ha"):
        vae_limit(own, x)
    masked = Autoencoder.masked((1, 2, 3), (1, 1), width=4, depth=1, heads=1, seed=0).double()
    for call in (lambda: vae_limit(masked, x), masked.as_vae):
        with pytest.raises(
            ValueError, match="a masked autoencoder scores entries that are hidden"
        ):
            call()


def test_the_plot_shows_the_excess_of_each_width_over_the_autoencoder():
    found = vae_limit(make(), draw(N, D), scales=[1, 0.1, 0.01], seed=0)
    ax = point_plots.plot_vae_limit(found)
    above, code = ax.get_lines()
    np.testing.assert_allclose(above.get_ydata(), found.difference.abs())
    np.testing.assert_allclose(above.get_xdata(), [1, 0.1, 0.01])
    point = found.autoencoder - found.autoencoder_reconstruction
    np.testing.assert_allclose(code.get_ydata(), (found.cross_entropy - point).abs())
    assert ax.xaxis_inverted() and "nats per datum" in ax.get_ylabel()
    assert_texts_are_readable(ax.figure)
    plt.close(ax.figure)
