"""Autoencoders as pairs: losses, PCA, sparse codes, denoising, and refused arguments."""

import copy
import itertools
import math
import os
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from scipy.linalg import subspace_angles
from scipy.special import expit
from sklearn.decomposition import sparse_encode
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import combinations
import oracles
from draws import draw
from ppl_vae import AmortizedGuide, PerDatumGuide, fit_closed_form, fit_svi, mlp
from ppl_vae.data.files.tables import read_table
from ppl_vae.evaluation import (
    Annealing,
    bidirectional,
    collapse,
    gaps,
    impute,
    kl_by_dimension,
    log_likelihood,
)
from ppl_vae.evaluation.prediction.predictive import decode, encode, reconstruct
from ppl_vae.inference import best_codes
from ppl_vae.likelihoods import Bernoulli, Gaussian
from ppl_vae.models import PPCA, Autoencoder, load, save
from ppl_vae.networks import GaussianNoise, MaskingNoise
from ppl_vae.networks.sparse_layers import NormalizedColumns, SoftThreshold
from ppl_vae.objectives import IWAE, elbo, log_weights

N, D, K = 40, 6, 3


def squares(x, y):
    return float((x - y).square().sum(1).mean())


def fitted(autoencoder, x, *, steps, lr, **options):
    def cosine(optimizer, number):
        return CosineAnnealingLR(optimizer, number)

    settings = {"scheduler": cosine, "capture": False, "seed": 0} | options
    guide = settings.pop("guide", autoencoder.guide)
    fit_svi(autoencoder.model, guide, x, steps=steps, lr=lr, **settings)
    return autoencoder


# Losses against their formulas


GAUSSIAN = 0.7
MADE = {
    "linear": lambda **options: Autoencoder.linear(D, K, **options),
    "tied": lambda **options: Autoencoder.linear(D, K, tied=True, **options),
    "orthonormal": lambda **options: Autoencoder.linear(
        D, K, tied=True, columns="orthonormal", **options
    ),
    "one hidden layer": lambda **options: Autoencoder.mlp(
        D, K, hidden=(), code_activation="relu", **options
    ),
    "deep": lambda **options: Autoencoder.mlp(D, K, hidden=(5,), activation="sigmoid", **options),
    "over-complete": lambda **options: Autoencoder.linear(D, 9, columns="unit", **options),
    "thresholded": lambda **options: Autoencoder.mlp(
        D, 9, code_activation="soft-threshold", **options
    ),
}


def reference_reconstruction(autoencoder, x):
    """f(x) and G(f(x)), computed from the weights by numpy."""
    weights = [p.detach().numpy() for p in autoencoder.decoder.parameters()]
    return weights, autoencoder.guide.encoder(x), autoencoder.decoder(autoencoder.guide.encoder(x))


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_the_negative_log_joint_is_half_the_squared_error_plus_a_constant(make):
    autoencoder = make(likelihood=Gaussian(GAUSSIAN), seed=0).double()
    x = draw(N, D)
    _, _, output = reference_reconstruction(autoencoder, x)
    loss = (x - output).square().sum(1) / (2 * GAUSSIAN**2)
    constant = D / 2 * math.log(2 * math.pi * GAUSSIAN**2)
    expected = (loss + constant).detach()
    found = -elbo(autoencoder.model, autoencoder.guide, x)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-12)
    weights = log_weights(autoencoder.model, autoencoder.guide, x, 3)
    torch.testing.assert_close(-weights, expected.expand(3, N), rtol=1e-13, atol=1e-12)


def test_linear_networks_have_the_stated_constraints():
    x = draw(N, D).numpy()
    ours = Autoencoder.linear(D, K, tied=True, seed=0).double()
    (weight, bias), codes, output = reference_reconstruction(ours, torch.as_tensor(x))
    np.testing.assert_allclose(codes.detach(), (x - bias) @ weight, rtol=1e-12)
    expected = (x - bias) @ weight @ weight.T + bias
    np.testing.assert_allclose(output.detach(), expected, rtol=1e-12)
    assert {n for n, _ in ours.named_parameters()} == {"decoder.0.weight", "decoder.0.bias"}
    kept = Autoencoder.linear(D, K, columns="orthonormal", seed=0).double().decoder[0].weight
    np.testing.assert_allclose(kept.T.detach() @ kept.detach(), np.eye(K), atol=1e-12)
    long = Autoencoder.linear(D, 9, columns="unit", seed=0).double().decoder[0].weight
    np.testing.assert_allclose(long.norm(dim=0).detach(), np.ones(9), rtol=1e-12)


@pytest.mark.parametrize("penalty", [0.2, 1.0, 30.0])
def test_a_laplace_prior_is_an_l1_penalty_plus_a_constant(penalty):
    autoencoder = Autoencoder.linear(
        D, 9, columns="unit", prior="laplace", penalty=penalty, seed=0
    ).double()
    x = draw(N, D)
    _, codes, output = reference_reconstruction(autoencoder, x)
    loss = 0.5 * (x - output).square().sum(1) + penalty * codes.abs().sum(1)
    constant = D / 2 * math.log(2 * math.pi) + 9 * math.log(2 / penalty)
    found = -elbo(autoencoder.model, autoencoder.guide, x)
    torch.testing.assert_close(found, (loss + constant).detach(), rtol=1e-13, atol=1e-12)


def test_a_bernoulli_likelihood_gives_a_cross_entropy():
    autoencoder = Autoencoder.mlp(
        D, K, hidden=(), code_activation="sigmoid", likelihood=Bernoulli(soft_targets=True), seed=0
    ).double()
    x = torch.rand(N, D, generator=torch.Generator().manual_seed(0)).double()
    code = expit(autoencoder.guide.encoder[0](x).detach().numpy())
    weight, bias = (p.detach().numpy() for p in autoencoder.decoder.parameters())
    output = expit(code @ weight.T + bias)
    loss = -(x.numpy() * np.log(output) + (1 - x.numpy()) * np.log1p(-output)).sum(1)
    np.testing.assert_allclose(-elbo(autoencoder.model, autoencoder.guide, x), loss, rtol=1e-12)
    np.testing.assert_allclose(autoencoder.reconstruct(x), output, rtol=1e-12)
    np.testing.assert_allclose(autoencoder.features(x), code, rtol=1e-12)


def test_missing_values_are_reconstructed_and_not_scored():
    autoencoder = Autoencoder.mlp(D, K, hidden=(5,), seed=0).double()
    mask = draw(N, D, seed=1) < 1
    x = torch.where(mask, draw(N, D), torch.nan)
    output = autoencoder.decoder(autoencoder.guide.encoder(torch.where(mask, x, 0.0)))
    loss = torch.where(mask, (x - output).square() / 2 + 0.5 * math.log(2 * math.pi), 0.0).sum(1)
    torch.testing.assert_close(-elbo(autoencoder.model, autoencoder.guide, x), loss.detach())
    torch.testing.assert_close(autoencoder.reconstruct(x), output.detach())


# As a pair


def test_pyros_loss_agrees_and_trains_the_pair():
    autoencoder, x = Autoencoder.linear(D, K, tied=True, seed=0).double(), draw(N, D)
    adam = pyro.optim.Adam({"lr": 0.01})
    svi = SVI(autoencoder.model, autoencoder.guide, adam, Trace_ELBO())
    expected = -elbo(autoencoder.model, autoencoder.guide, x).sum()
    assert svi.evaluate_loss(x) == pytest.approx(float(expected), rel=1e-12)
    for _ in range(30):
        svi.step(x)
    assert -elbo(autoencoder.model, autoencoder.guide, x).sum() < expected - N / 10


def test_features_agree_with_encode():
    autoencoder, x = Autoencoder.mlp(D, K, hidden=(5,), seed=0).double(), draw(N, D)
    codes = autoencoder.features(x.numpy())
    torch.testing.assert_close(codes, autoencoder.guide.encoder(x).detach())
    pair = autoencoder.model, autoencoder.guide
    torch.testing.assert_close(encode(*pair, x), codes)
    torch.testing.assert_close(reconstruct(*pair, x), autoencoder.reconstruct(x))
    torch.testing.assert_close(decode(autoencoder.model, codes, x), autoencoder.reconstruct(x))
    torch.testing.assert_close(autoencoder.decode(codes).mean, autoencoder.reconstruct(x))


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_a_loaded_autoencoder_equals_the_saved_one(make, tmp_path):
    noise = MaskingNoise(0.3, value=-1.0)
    autoencoder = make(prior="laplace", penalty=2.0, corruption=noise, seed=0).double()
    again = load(save(autoencoder, tmp_path))
    x = draw(N, D)
    assert again.guide.corruption == noise
    assert again.corruption == noise
    values = [elbo(each.model, each.guide, x) for each in (autoencoder, again)]
    assert torch.equal(*values)
    copied = copy.deepcopy(autoencoder)
    fit_svi(copied.model, copied.guide, x, steps=2, lr=0.1, capture=False, seed=0)
    assert torch.equal(elbo(autoencoder.model, autoencoder.guide, x), values[0])
    assert not torch.equal(elbo(copied.model, copied.guide, x), values[0])


def test_a_user_written_corruption_is_loaded_into_an_autoencoder_of_the_caller(tmp_path):
    def tripled(rows):
        return 3 * rows

    autoencoder = Autoencoder.linear(D, K, corruption=tripled, seed=0)
    save(autoencoder, tmp_path)
    with pytest.raises(ValueError, match="pass it as into="):
        load(tmp_path)
    other = load(tmp_path, into=Autoencoder.linear(D, K, corruption=tripled, seed=1))
    x = draw(N, D).float()
    assert torch.equal(other.features(x), autoencoder.features(x))


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("make", [MADE["tied"], MADE["orthonormal"], MADE["thresholded"]])
def test_captured_steps_equal_eager_steps(make):
    x = draw(N, D)
    ends = []
    for capture in (False, True):
        autoencoder = make(seed=0).double()
        pair = autoencoder.model, autoencoder.guide
        fit = fit_svi(*pair, x, steps=20, lr=0.01, capture=capture, seed=0)
        assert fit.execution.startswith("compiled") is capture
        ends.append(elbo(*pair, x))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-9)


def test_a_fit_notes_that_its_objective_is_no_bound():
    autoencoder, x = Autoencoder.linear(D, K, seed=0), draw(N, D).float()
    fit = fit_svi(autoencoder.model, autoencoder.guide, x, x_val=x[:5], steps=2, capture=False)
    assert "no bound on log p(x)" in repr(fit)


# Operations that autoencoders do not support


def test_a_flat_prior_cannot_be_sampled_and_a_laplace_prior_can():
    flat = Autoencoder.linear(D, K, seed=0)
    for call in (
        lambda: flat.sample(3),
        lambda: flat.model(num_data=3),
        lambda: Predictive(flat.model, num_samples=2)(num_data=3),
        lambda: log_likelihood(flat.model, None, draw(N, D), method="prior"),
    ):
        with pytest.raises(ValueError, match="a flat prior cannot be sampled: an autoencoder is"):
            call()
    laplace = Autoencoder.linear(D, K, prior="laplace", penalty=4.0, seed=0).double()
    assert laplace.sample(5, seed=0).shape == (5, D)
    assert torch.equal(laplace.sample(5, seed=0), laplace.sample(5, seed=0))
    many = 20_000
    z = laplace.prior().sample(torch.Size([many]))  # |z_k| is exponential: mean and sd 1/4
    assert z.dtype == torch.float64
    score = (z.abs().mean(0) - 0.25) / (0.25 / math.sqrt(many))
    assert float(score.abs().max()) < oracles.z_limit(K)


@pytest.mark.parametrize(
    "measure",
    [
        lambda *pair: log_likelihood(*pair),
        lambda *pair: log_likelihood(*pair, refine=5),
        lambda *pair: log_likelihood(*pair, method="annealed"),
        lambda *pair: gaps(*pair),
        lambda *pair: collapse(*pair),
        lambda *pair: kl_by_dimension(*pair),
        lambda *pair: bidirectional(*pair),
        lambda model, guide, x: impute(model, guide, torch.where(x > 1, torch.nan, x)),
    ],
)
def test_evaluations_that_need_a_density_are_refused(measure):
    x = draw(N, D)
    flat = Autoencoder.linear(D, K, seed=0).double()
    with pytest.raises(ValueError, match="'z' of the model has a flat prior, which is no density"):
        measure(flat.model, flat.guide, x)
    wide = Autoencoder(
        decoder=mlp(K, D), guide=AmortizedGuide(mlp(D, 2 * K), K), data_dim=D, latent_dim=K
    ).double()
    with pytest.raises(ValueError, match="'z' of the model has a flat prior, which is no density"):
        measure(wide.model, wide.guide, x)
    laplace = Autoencoder.linear(D, K, prior="laplace", seed=0).double()
    with pytest.raises(ValueError, match="guide is a Delta: a point mass has no density"):
        measure(laplace.model, laplace.guide, x)


def test_a_user_written_flat_prior_is_refused(float64):
    def model(x=None):
        with pyro.plate("data", len(x)):
            flat = dist.ImproperUniform(dist.constraints.real_vector, (), (D,))
            z = pyro.sample("z", flat)
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x, event_dim=1))

    x = draw(N, D)
    constant = -D / 2 * math.log(2 * math.pi)
    torch.testing.assert_close(elbo(model, guide, x), torch.full((N,), constant))
    with pytest.raises(ValueError, match="flat prior, which is no density"):
        log_likelihood(model, guide, x)


def test_annealing_from_a_laplace_prior_needs_no_guide():
    autoencoder = Autoencoder.linear(3, 1, prior="laplace", seed=0).double()
    x = draw(5, 3)
    weight, bias = (p.detach() for p in autoencoder.decoder.parameters())
    grid = torch.linspace(-40, 40, 40_001).double()[:, None]
    joint = dist.Normal(grid @ weight.T + bias, 1.0).to_event(1).log_prob(x[:, None])
    joint = joint + dist.Laplace(0.0, 1.0).log_prob(grid[:, 0])
    exact = torch.logsumexp(joint, 1) + math.log(float(grid[1] - grid[0]))
    found = log_likelihood(
        autoencoder.model,
        None,
        x,
        200,
        method="annealed",
        annealing=Annealing(num_temperatures=20, leapfrog=3),
        capture=False,
        seed=0,
    )
    score = (found.value - exact) / found.standard_error
    assert float(score.abs().max()) < oracles.z_limit(5)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"prior": "horseshoe"}, "prior must be one of 'flat', 'normal', 'laplace'; got 'horse"),
        ({"penalty": 1.0}, "penalty= requires prior='laplace' or prior='normal'; prior is 'fl"),
        ({"prior": "laplace", "penalty": 0.0}, "penalty must be positive; got 0.0"),
        ({"columns": "long"}, "columns must be one of 'free', 'unit', 'orthonormal'; got 'long'"),
        ({"code_activation": "step"}, "code_activation must be one of 'linear', 'soft-threshold'"),
        (
            {"latent_dim": 7, "columns": "orthonormal", "hidden": ()},
            "7 columns cannot be orthogonal in 6",
        ),
        ({"latent_dim": 0}, "width must be a whole number >= 1; got 0"),
        ({"tied": True, "hidden": (4,)}, "tied=True needs an encoder that can be the decoder's"),
        ({"tied": True, "hidden": (), "missing": "zeros+mask"}, "tied=True needs an encoder"),
    ],
)
def test_incompatible_arguments_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        Autoencoder.mlp(**({"data_dim": D, "latent_dim": K} | arguments))


def test_incompatible_parts_are_refused():
    parts = {"decoder": mlp(K, D), "data_dim": D, "latent_dim": K}
    with pytest.raises(ValueError, match="give exactly one of encoder and guide"):
        Autoencoder(**parts)
    guide = PerDatumGuide(N, K, covariance="delta")
    with pytest.raises(
        ValueError, match="corruption= is for the guide that is made from encoder="
    ):
        Autoencoder(**parts, guide=guide, corruption=GaussianNoise(0.1))
    narrow = Autoencoder(**parts, encoder=mlp(D, 2 * K))
    with pytest.raises(ValueError, match=rf"the encoder must return \(rows, {K}\)"):
        narrow.features(draw(N, D))


# Linear autoencoders and PCA


GAPPED = torch.as_tensor(oracles.simulate_ppca([6.0, 4.0, 2.5], 0.2, 300, 8, 0))
LINEAR = [{}, {"tied": True}, {"tied": True, "columns": "orthonormal"}]


def assert_is_pca(kind, seed):
    spectrum, axes = oracles.sample_spectrum(GAPPED.numpy())
    autoencoder = Autoencoder.linear(8, 3, seed=seed, **kind).double().center(GAPPED)
    fitted(autoencoder, GAPPED, steps=250 if kind else 600, lr=0.05)
    best = spectrum[3:].sum()
    error = squares(GAPPED, autoencoder.reconstruct(GAPPED))
    assert 1 - 1e-10 < error / best < 1 + 1e-4
    loadings = autoencoder.decoder[0].weight.detach().numpy()
    assert subspace_angles(loadings, axes[:, :3]).max() < 1e-2


@pytest.mark.parametrize(
    "kind", combinations.one_in(3, LINEAR), ids=["untied", "tied", "orthonormal"]
)
def test_a_linear_autoencoder_is_pca(kind):
    assert_is_pca(kind, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 21))
@pytest.mark.parametrize("kind", LINEAR, ids=["untied", "tied", "orthonormal"])
def test_a_linear_autoencoder_is_pca_from_any_start(kind, seed):
    assert_is_pca(kind, seed)


@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_one_nonlinear_layer_does_not_improve_on_pca(activation):
    spectrum, _ = oracles.sample_spectrum(GAPPED.numpy())
    autoencoder = Autoencoder.mlp(8, 3, hidden=(), code_activation=activation, seed=0).double()
    fitted(autoencoder.center(GAPPED), GAPPED, steps=200, lr=0.05)
    error, best = squares(GAPPED, autoencoder.reconstruct(GAPPED)), spectrum[3:].sum()
    assert error >= best * (1 - 1e-10)
    assert error < spectrum.sum() / 2  # the encoder has learned


def helix(number, seed):
    turns = 2 * torch.rand(number, generator=torch.Generator().manual_seed(seed)).double()
    angle = 2 * torch.pi * turns
    return torch.stack([angle.cos(), angle.sin(), 3 * (turns - 1)], 1)


def assert_four_layers_fit_better_than_a_line(x, **options):
    spectrum, _ = oracles.sample_spectrum(x.numpy())
    autoencoder = Autoencoder.mlp(
        3, 1, hidden=(50,), activation="sigmoid", likelihood=Gaussian(0.3), seed=0
    ).double()
    fitted(autoencoder, x, lr=0.05, **options)
    assert squares(x, autoencoder.reconstruct(x)) < spectrum[1:].sum() / 2


@pytest.mark.slow
def test_four_layers_fit_a_curve_that_no_line_fits():
    assert_four_layers_fit_better_than_a_line(helix(300, 0), steps=400)


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif("PPL_VAE_DATA" not in os.environ, reason="set PPL_VAE_DATA")
def test_four_layers_fit_the_helix_of_pcamethods():
    file = Path(os.environ["PPL_VAE_DATA"]) / "pcaMethods" / "helix.csv"
    x = torch.as_tensor(read_table(file).values).double()
    assert_four_layers_fit_better_than_a_line((x - x.mean(0)) / x.std(0), steps=400)


@pytest.mark.slow
def test_an_over_complete_linear_autoencoder_learns_nothing():
    autoencoder = fitted(Autoencoder.linear(8, 12, seed=0).double(), GAPPED, steps=500, lr=0.05)
    assert squares(GAPPED, autoencoder.reconstruct(GAPPED)) < 1e-8
    noise = 0.5 * draw(300, 8, seed=1)
    other = 3 * draw(300, 8, seed=2)  # unrelated to the training data
    torch.testing.assert_close(autoencoder.reconstruct(other), other, rtol=0, atol=1e-3)
    noisy = GAPPED + noise
    torch.testing.assert_close(autoencoder.reconstruct(noisy), noisy, rtol=0, atol=1e-3)


# Sparse codes


def dictionary(penalty=0.3, **options):
    made = Autoencoder.linear(
        D, 9, columns="unit", prior="laplace", penalty=penalty, seed=0, **options
    )
    with torch.no_grad():
        made.decoder[0].bias.zero_()
    return made.double()


@pytest.mark.parametrize("penalty", [0.05, 0.3, 1.0])
def test_best_codes_are_the_lasso_of_scikit_learn(penalty):
    model, x = dictionary(penalty), draw(N, D)
    found = best_codes(model, x, tolerance=1e-8)
    atoms = model.decoder[0].weight.detach().numpy().T.copy()
    expected = sparse_encode(
        x.numpy(), atoms, algorithm="lasso_cd", alpha=penalty, max_iter=100_000
    )
    np.testing.assert_allclose(found.codes, expected, atol=1e-4)
    np.testing.assert_array_equal(found.codes == 0, expected == 0)
    assert bool(found.converged.all())
    loss = 0.5 * ((x.numpy() - expected @ atoms) ** 2).sum(1) + penalty * abs(expected).sum(1)
    constant = D / 2 * math.log(2 * math.pi) + 9 * math.log(2 / penalty)
    np.testing.assert_allclose(-found.log_joint, loss + constant, rtol=1e-6)
    assert f"{found.share_of_zeros:.0%} of entries zero" in repr(found)


def test_best_codes_without_a_penalty_are_least_squares():
    model, x = Autoencoder.linear(D, K, seed=0).double(), draw(N, D)
    weight, bias = (p.detach().numpy() for p in model.decoder.parameters())
    expected = np.linalg.lstsq(weight, (x.numpy() - bias).T, rcond=None)[0].T
    found = best_codes(model, x, tolerance=1e-8)
    np.testing.assert_allclose(found.codes, expected, atol=1e-5)
    assert found.share_of_zeros == 0


def test_best_codes_satisfy_the_optimality_conditions_under_any_likelihood():
    penalty = 0.3
    model = Autoencoder.linear(
        D, K, columns="unit", prior="laplace", penalty=penalty, likelihood=Bernoulli(), seed=0
    ).double()
    mask = draw(N, D, seed=1) < 1
    x = torch.where(mask, (draw(N, D) > 0).double(), torch.nan)
    z = best_codes(model, x, tolerance=1e-7).codes.numpy()
    layer = model.decoder[0]
    weight, bias = (p.detach().numpy() for p in (layer.weight, layer.bias))
    residual = np.where(mask, np.nan_to_num(x.numpy()) - expit(z @ weight.T + bias), 0.0)
    slope = residual @ weight
    np.testing.assert_allclose(slope[z != 0], penalty * np.sign(z[z != 0]), atol=1e-6)
    assert (abs(slope[z == 0]) <= penalty + 1e-6).all()
    assert (z == 0).any() and (z != 0).any()


def test_best_codes_report_when_they_have_not_converged():
    found = best_codes(dictionary(), draw(N, D), max_iterations=1)
    assert not found.converged.all()
    assert "converged for" in repr(found)
    for arguments, match in (
        ({"tolerance": 0.0}, "tolerance must be positive, in nats per unit of z; got 0.0"),
        ({"max_iterations": 0}, "max_iterations must be a whole number >= 1; got 0"),
    ):
        with pytest.raises(ValueError, match=match):
            best_codes(dictionary(), draw(N, D), **arguments)


def test_a_larger_penalty_gives_more_zeros():
    x = draw(N, D)
    shares = [best_codes(dictionary(p), x).share_of_zeros for p in (0.03, 0.1, 0.3, 1.0, 3.0)]
    assert all(low < high for low, high in itertools.pairwise(shares))


@pytest.mark.slow
def test_a_larger_penalty_gives_more_zeros_of_an_encoder():
    shares = []
    for penalty in (0.1, 0.5, 2.0):
        model = fitted(
            dictionary(penalty, code_activation="soft-threshold"), draw(200, D), **SHORT
        )
        shares.append(float((model.features(draw(N, D, seed=1)) == 0).double().mean()))
    assert 0 < shares[0] < shares[1] < shares[2]


SHORT = {"steps": 120, "lr": 0.03}


def scaled(autoencoder, factor):
    """The decoder's weights multiplied, the encoder's divided."""
    other = copy.deepcopy(autoencoder)
    with torch.no_grad():
        for parameter in other.guide.encoder.parameters():
            parameter.div_(factor)
        first = other.decoder[0]
        (first.free if isinstance(first, NormalizedColumns) else first.weight).mul_(factor)
    return other


def test_scaling_cannot_lower_the_objective_of_unit_columns():
    x = draw(N, D)
    free, unit = (
        Autoencoder.linear(D, 9, columns=c, prior="laplace", seed=0).double()
        for c in ("free", "unit")
    )
    larger = scaled(free, 100.0)
    cheaper = elbo(larger.model, larger.guide, x) - elbo(free.model, free.guide, x)
    codes = free.features(x).abs().sum(1)
    torch.testing.assert_close(cheaper, 0.99 * codes)  # only the penalty decreases
    # With unit columns the decoder's scale is fixed, and scaling the best codes is no gain.
    alone = copy.deepcopy(unit)
    with torch.no_grad():
        alone.decoder[0].free.mul_(100.0)
    difference = elbo(alone.model, alone.guide, x) - elbo(unit.model, unit.guide, x)
    assert float(difference.abs().max()) < 1e-11
    best = best_codes(unit, x, tolerance=1e-9)
    for factor in (0.5, 0.9, 1.1, 2.0):
        z = factor * best.codes
        joint = unit.decode(z).log_prob(x) + unit.prior().log_prob(z)
        lower = joint < best.log_joint
        assert torch.equal(lower, (best.codes != 0).any(1))
    assert bool(lower.any())


@pytest.mark.slow
def test_dictionary_learning_has_a_free_code_for_each_datum():
    atoms = nn.functional.normalize(draw(D, 9, seed=3), dim=0)
    codes = draw(200, 9) * (draw(200, 9, seed=1) > 0.8)
    x = codes @ atoms.T + 0.05 * draw(200, D, seed=2)
    options = {"prior": "laplace", "penalty": 0.1, "data_dim": D, "latent_dim": 9}
    decoder = nn.Sequential(NormalizedColumns(nn.Linear(9, D), "unit"))
    model = Autoencoder(
        decoder=decoder, guide=PerDatumGuide(200, 9, covariance="delta"), **options
    ).double()
    with torch.no_grad():
        model.guide.loc.copy_(best_codes(model, x).codes)
    before = elbo(model.model, model.guide, x)
    fitted(model, x, steps=200, lr=0.03)
    learned = elbo(model.model, model.guide, x)
    constant = D / 2 * math.log(2 * math.pi) + 9 * math.log(20)
    assert -learned.mean() - constant < 0.8 * (-before.mean() - constant)
    best = best_codes(model, x, tolerance=1e-7)
    assert bool((best.log_joint >= learned - 1e-9).all())
    amortized = fitted(
        Autoencoder(
            encoder=nn.Sequential(nn.Linear(D, 9), SoftThreshold(9)),
            decoder=copy.deepcopy(decoder),
            **options,
        ).double(),
        x,
        **SHORT,
    )
    best = best_codes(amortized, x, tolerance=1e-7).log_joint
    gap = best - elbo(amortized.model, amortized.guide, x)
    assert float(gap.min()) > -1e-9
    assert float(gap.mean()) > 0


def test_point_masses_are_a_family_of_guides():
    guide = PerDatumGuide(N, K, covariance="delta").double()
    with torch.no_grad():
        guide.loc.copy_(draw(N, K))
    x = draw(N, D)
    site = poutine.trace(guide).get_trace(x).nodes["z"]
    assert torch.equal(site["value"], guide.loc)
    assert float(site["fn"].log_prob(site["value"]).abs().max()) == 0
    assert torch.equal(guide.distribution(x[:2], torch.tensor([3, 1])).mean, guide.loc[[3, 1]])
    with pytest.raises(ValueError, match=r"must be one of 'unit'.*'delta'; got 'point'"):
        PerDatumGuide(N, K, covariance="point")


def test_importance_weighting_a_point_mass_changes_nothing():
    autoencoder, x = Autoencoder.linear(D, K, seed=0).double(), draw(N, D)
    value, _ = IWAE(5).mean_value(autoencoder.model, autoencoder.guide, x)
    torch.testing.assert_close(
        value.detach(), elbo(autoencoder.model, autoencoder.guide, x).mean()
    )


# Denoising


@pytest.mark.parametrize("noise", [GaussianNoise(0.4), MaskingNoise(0.3, value=7.0)])
def test_the_guide_is_given_corrupted_data_in_training_and_the_model_scores_clean_data(noise):
    autoencoder = Autoencoder.mlp(D, K, hidden=(5,), corruption=noise, seed=0).double()
    x = draw(N, D)
    torch.manual_seed(1)
    corrupted = noise(x)
    assert not torch.equal(corrupted, x)
    torch.manual_seed(1)
    value = log_weights(autoencoder.model, autoencoder.guide, x)[0]
    output = autoencoder.decoder(autoencoder.guide.encoder(corrupted))
    loss = 0.5 * (x - output).square().sum(1) + D / 2 * math.log(2 * math.pi)
    torch.testing.assert_close(value, -loss)
    clean = autoencoder.guide.encoder(x).detach()
    assert torch.equal(autoencoder.features(x), clean)
    torch.testing.assert_close(autoencoder.reconstruct(x), autoencoder.decoder(clean).detach())
    assert torch.equal(
        elbo(autoencoder.model, autoencoder.guide, x),
        elbo(autoencoder.model, autoencoder.guide, x),
    )
    assert autoencoder.training


def test_noise_has_the_stated_distribution():
    x = torch.zeros(200, 100).double()
    torch.manual_seed(0)
    noisy, masked = GaussianNoise(0.5)(x), MaskingNoise(0.3, value=2.0)(x)
    number = x.numel()
    share = float((masked == 2).double().mean())
    scores = [
        float(noisy.mean()) / (0.5 / math.sqrt(number)),
        float(noisy.square().mean() / 0.25 - 1) / math.sqrt(2 / number),
        (share - 0.3) / math.sqrt(0.3 * 0.7 / number),
    ]
    assert max(map(abs, scores)) < oracles.z_limit(3)
    assert set(masked.unique().tolist()) == {0.0, 2.0}
    assert repr(MaskingNoise(0.3)) == "MaskingNoise(share=0.3, value=0.0)"
    with pytest.raises(ValueError, match="scale must be positive, in the units of x; got 0"):
        GaussianNoise(0)
    with pytest.raises(ValueError, match="share must lie between 0 and 1; got 1"):
        MaskingNoise(1)


def test_missing_values_stay_missing_under_noise():
    guide = AmortizedGuide(nn.Identity(), D, covariance="delta", corruption=GaussianNoise(1.0))
    mask = draw(N, D) < 0.5
    inputs = guide.distribution(draw(N, D), mask=mask).mean
    assert torch.equal(inputs == 0, ~mask)
    wrong = AmortizedGuide(nn.Identity(), D, covariance="delta", corruption=lambda x: x[:, 1:])
    with pytest.raises(
        ValueError, match=r"corruption must keep the shape of x, \(40, 6\); it ret"
    ):
        wrong.distribution(draw(N, D))


@pytest.mark.slow
def test_an_over_complete_denoising_autoencoder_improves_on_the_identity():
    scale = 0.7
    autoencoder = fitted(
        Autoencoder.linear(8, 12, corruption=GaussianNoise(scale), seed=0).double(),
        GAPPED,
        steps=250,
        lr=0.05,
    )
    noisy = GAPPED + scale * draw(300, 8, seed=1)
    kept = autoencoder.reconstruct(noisy)
    # Wiener's expected error, that of x given x + noise, bounds that of linear denoisers.
    spectrum, _ = oracles.sample_spectrum(GAPPED.numpy())
    wiener = (spectrum * scale**2 / (spectrum + scale**2)).sum()
    assert squares(kept, GAPPED) < 0.6 * squares(noisy, GAPPED)
    assert squares(kept, GAPPED) == pytest.approx(wiener, rel=0.2)


@pytest.mark.slow
def test_a_denoiser_of_the_helix_improves_on_that_of_ppca():
    scale = 0.3
    train, test = helix(500, 0), helix(500, 1)
    noisy = test + scale * draw(500, 3, seed=2)
    autoencoder = Autoencoder.mlp(
        3,
        3,
        hidden=(64,),
        activation="tanh",
        likelihood=Gaussian(scale),
        corruption=GaussianNoise(scale),
        seed=0,
    ).double()
    fitted(autoencoder, train, steps=250, lr=0.02)
    ours = squares(autoencoder.reconstruct(noisy), test)
    for latent_dim in (1, 2):
        ppca = PPCA.like(train, latent_dim=latent_dim)
        fit_closed_form(ppca, train + scale * draw(500, 3, seed=3))
        assert ours < squares(ppca.reconstruct(noisy).detach(), test)
    assert ours < 0.75 * squares(noisy, test)
