"""Supervised networks as pairs without latent variables, whose bound is log p(y | x)."""

import copy
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch import nn

import oracles
from draws import draw
from ppl_vae import AmortizedGuide, ExactGuide, fit_svi
from ppl_vae.evaluation import collapse, gaps, kl_by_dimension, log_likelihood
from ppl_vae.likelihoods import Categorical, Gaussian
from ppl_vae.models import PPCA, VAE, Autoencoder, SupervisedEncoder, load, save
from ppl_vae.networks import GaussianNoise
from ppl_vae.networks.mlp_conv import Bias, mlp, reset
from ppl_vae.networks.sparse_layers import SoftThreshold
from ppl_vae.objectives import ELBO, IWAE, elbo, log_weights

N, D, K, C = 60, 5, 3, 3
SHORT = {"steps": 30, "lr": 0.01, "seed": 0}


def classes(seed=1):
    """Classes of draw(N, D) that two of its columns predict with errors."""
    x, noise = draw(N, D), draw(N, C, seed=seed)
    return (torch.stack([x[:, 0], x[:, 1], -x[:, 0]], 1) + noise).argmax(1)


def autoencoder(**options):
    return Autoencoder.mlp(D, K, hidden=(7,), seed=0, **options).double()


def parameters(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(before, after):
    return {name for name in before if torch.equal(before[name], after[name])}


# Pairs without latent variables


class Alone(nn.Module):
    """x ~ N(loc, scale) without latent variables, as a user would write it."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(draw(D, seed=3))

    def model(self, x, *, index=None, num_data=None):
        pyro.module("alone", self)
        rows = torch.arange(len(x)) if index is None else index
        with pyro.plate("data", num_data or len(x), subsample=rows):
            pyro.sample("x", dist.Normal(self.loc, 0.7).to_event(1), obs=x)

    def guide(self, x):
        pass

    def log_p(self, x):
        return torch.distributions.Normal(self.loc, 0.7).log_prob(x).sum(1)


OBJECTIVES = [
    ELBO(),
    ELBO(3),
    ELBO(beta=0.1),
    ELBO(kl="sampled"),
    ELBO(free_bits=1.0),
    ELBO(gradient="stl"),
    ELBO(3, gradient="score"),
    ELBO(3, gradient="score-loo"),
    IWAE(4),
    IWAE(4, gradient="dreg"),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_without_latent_variables_every_bound_is_log_p(objective):
    alone, x = Alone(), draw(N, D)
    value, num_data = objective.mean_value(alone.model, alone.guide, x)
    expected = alone.log_p(x).mean()
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
    slopes = [torch.autograd.grad(v, alone.loc)[0] for v in (value, expected)]
    torch.testing.assert_close(*slopes)
    assert num_data == N


def test_without_latent_variables_every_estimate_is_exact():
    alone, x = Alone(), draw(N, D)
    expected = alone.log_p(x).detach()
    torch.testing.assert_close(elbo(alone.model, alone.guide, x, num_samples=3), expected)
    weights = log_weights(alone.model, alone.guide, x, 4).detach()
    torch.testing.assert_close(weights, expected.expand(4, -1))
    found = log_likelihood(alone.model, alone.guide, x, 30)
    torch.testing.assert_close(found.value, expected)
    assert bool(found.reliable.all()) and float(found.standard_error.max()) < 1e-7


def test_without_latent_variables_fits_reach_the_maximum_likelihood():
    x = draw(N, D) + 2
    ours, theirs = Alone(), Alone()
    options = {
        "batch_size": 20,
        "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR,
        "seed": 0,
    }
    fit = fit_svi(ours.model, ours.guide, x[:40], x_val=x[40:], epochs=20, lr=0.1, **options)
    assert fit.validation is not None
    best = float(fit.validation.max())
    assert best == pytest.approx(float(ours.log_p(x[40:]).mean().detach()), abs=1e-10)
    # The curvature of log p is 1 / 0.49, so each step of 0.4 leaves 0.09 / 0.49 of the distance.
    options = {"steps": 20, "lr": 0.4, "optimizer": torch.optim.SGD, "warmup": 5, "seed": 0}
    whole = fit_svi(ours.model, ours.guide, x, **options)
    torch.testing.assert_close(ours.loc.detach(), x.mean(0), rtol=0, atol=1e-10)
    assert float(whole.objective[-1]) == pytest.approx(
        float(ours.log_p(x).mean().detach()), abs=1e-6
    )
    svi = SVI(theirs.model, theirs.guide, pyro.optim.SGD({"lr": 0.4 / N}), Trace_ELBO())
    for _ in range(20):
        svi.step(x)
    torch.testing.assert_close(theirs.loc.detach(), x.mean(0), rtol=0, atol=1e-10)


def test_evaluations_that_need_latent_variables_are_refused():
    alone, x = Alone(), draw(N, D)
    pair = alone.model, alone.guide
    for call in (
        lambda: gaps(*pair, x, steps=2),
        lambda: collapse(*pair, x),
        lambda: kl_by_dimension(*pair, x),
        lambda: log_likelihood(*pair, x, 30, refine=2),
        lambda: log_likelihood(*pair, x, 30, method="annealed"),
    ):
        with pytest.raises(ValueError, match=r"no latent variables, .* is log p itself, exactly"):
            call()


# Supervised encoders


def network(pair=None, **options):
    return SupervisedEncoder(pair or autoencoder(), Categorical(C), **{"seed": 0} | options)


def test_the_bound_is_the_cross_entropy_of_softmax_regression_on_codes():
    pair, x, y = autoencoder(), draw(N, D), classes()
    codes = pair.features(x).numpy()
    oracle = LogisticRegression(C=np.inf, tol=1e-10, max_iter=10_000).fit(codes, y.numpy())
    made = network(pair, encoder="frozen")
    with torch.no_grad():
        made.head.weight.copy_(torch.as_tensor(oracle.coef_))
        made.head.bias.copy_(torch.as_tensor(oracle.intercept_))
    rows = made.rows(x, y)
    probabilities = made.predict(x).base_dist.probs[:, 0].numpy()
    np.testing.assert_allclose(probabilities, oracle.predict_proba(codes), atol=1e-12)
    value = elbo(made.model, made.guide, rows)
    assert float(value.mean()) == pytest.approx(-log_loss(y, probabilities), abs=1e-12)
    loss = ELBO().differentiable_loss(made.model, made.guide, rows)
    slopes = torch.autograd.grad(loss, list(made.head.parameters()))
    assert max(float(slope.abs().max()) for slope in slopes) < 1e-4  # a stationary point


def test_with_a_gaussian_likelihood_the_maximum_is_least_squares_on_codes():
    pair, x, y = autoencoder(), draw(N, D), draw(N, 2, seed=2)
    made = SupervisedEncoder(pair, Gaussian(0.7), num_labels=2, encoder="frozen", seed=0)
    codes = np.column_stack([pair.features(x), np.ones(N)])
    best, squares, *_ = np.linalg.lstsq(codes, y.numpy(), rcond=None)
    with torch.no_grad():
        made.head.weight.copy_(torch.as_tensor(best[:-1].T))
        made.head.bias.copy_(torch.as_tensor(best[-1]))
    rows = made.rows(x, y)
    expected = -squares.sum() / (2 * 0.7**2) / N - math.log(2 * math.pi * 0.7**2)
    assert float(elbo(made.model, made.guide, rows).mean()) == pytest.approx(expected, abs=1e-10)
    np.testing.assert_allclose(made.predict(x).mean, codes @ best, atol=1e-10)
    loss = ELBO().differentiable_loss(made.model, made.guide, rows)
    slopes = torch.autograd.grad(loss, list(made.head.parameters()))
    assert max(float(slope.abs().max()) for slope in slopes) < 1e-9


@pytest.mark.parametrize("encoder", ["fine-tuned", "frozen", "scratch"])
def test_which_parameters_are_trained(encoder):
    pair, x, y = autoencoder(corruption=GaussianNoise(0.5)), draw(N, D), classes()
    kept = parameters(pair)
    made = network(pair, encoder=encoder)
    begun = parameters(made.code_guide)
    original = {name.removeprefix("guide."): p for name, p in kept.items() if "guide." in name}
    assert begun.keys() == original.keys()
    assert {name: p.shape for name, p in begun.items()} == {
        n: p.shape for n, p in original.items()
    }
    assert same(begun, original) == (set() if encoder == "scratch" else set(begun))
    before = elbo(made.model, made.guide, made.rows(x, y)).mean()
    fit = fit_svi(made.model, made.guide, made.rows(x, y), **SHORT)
    assert fit.objective[-1] > before
    assert same(kept, parameters(pair)) == set(kept)
    moved = set(begun) - same(begun, parameters(made.code_guide))
    assert moved == (set() if encoder == "frozen" else set(begun))


def test_initial_heads_do_not_depend_on_the_encoder_and_seeds_repeat_the_networks():
    made = {encoder: network(encoder=encoder) for encoder in ("fine-tuned", "frozen", "scratch")}
    assert len({m.head.weight.sum().item() for m in made.values()}) == 1
    again = network(encoder="scratch")
    assert same(parameters(made["scratch"]), parameters(again)) == set(parameters(again))
    other = network(encoder="scratch", seed=1)
    assert same(parameters(other), parameters(again)) == set()
    before = torch.get_rng_state()
    network(encoder="scratch")
    assert torch.equal(before, torch.get_rng_state())


def test_from_scratch_head_and_encoder_are_drawn_independently():
    pair = Autoencoder.mlp(D, K, hidden=(7,), seed=0)
    made = network(pair, encoder="scratch")
    drawn = (made.code_guide.encoder[2].weight, made.head.weight)
    first, second = (w.detach().flatten()[: K * C].numpy() for w in drawn)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.9


def test_the_network_can_be_saved(tmp_path):
    made, other, x = (
        network(),
        network(Autoencoder.mlp(D, K, hidden=(7,), seed=3).double(), seed=1),
        draw(N, D),
    )
    save(made, tmp_path)
    load(tmp_path, into=other)
    assert torch.equal(made.predict(x).base_dist.logits, other.predict(x).base_dist.logits)


def test_training_uses_clean_data():
    made = network(autoencoder(corruption=GaussianNoise(0.5)))
    x = draw(N, D)
    assert made.training
    assert torch.equal(made.conditional(x).base_dist.logits, made.conditional(x).base_dist.logits)


def test_frozen_layers_apply_no_dropout_and_keep_batch_norm_statistics():
    encoder = nn.Sequential(nn.Linear(D, 7), nn.BatchNorm1d(7), nn.Dropout(0.5), nn.Linear(7, K))
    sizes = {"data_dim": D, "latent_dim": K}
    pair = Autoencoder(encoder=encoder, decoder=mlp(K, D), **sizes).double()
    made, x = network(pair, encoder="frozen"), draw(N, D)
    state = copy.deepcopy(made.code_guide.state_dict())
    fit_svi(made.model, made.guide, made.rows(x, classes()), **SHORT)
    assert all(torch.equal(state[name], now) for name, now in made.code_guide.state_dict().items())
    torch.testing.assert_close(
        made.code_guide.distribution(x).mean.isnan().any(), torch.tensor(False)
    )


class TwoHeads(nn.Module):
    """Location and scale are computed by separate networks."""

    def __init__(self):
        super().__init__()
        self.loc, self.scale = nn.Linear(D, K), nn.Linear(D, K)

    def forward(self, x):
        return self.loc(x), self.scale(x).exp()


@pytest.mark.parametrize("kind", ["log-variances", "two heads", "one covariance"])
def test_codes_of_a_vae_are_means(kind):
    made = VAE.mlp(D, K, hidden=(7,), seed=0)
    sizes = {"data_dim": D, "latent_dim": K, "likelihood": Gaussian(1.0), "decoder": mlp(K, D)}
    if kind == "two heads":
        made = VAE(encoder=TwoHeads(), **sizes)
    elif kind == "one covariance":
        made = VAE(guide=AmortizedGuide(mlp(D, K), K, homoscedastic=True), **sizes)
    made, x = made.double(), draw(N, D)
    mine = network(made)
    torch.testing.assert_close(mine.code_guide.distribution(x).mean.detach(), made.features(x))
    variances = made.guide.distribution(x).variance.detach()
    fit_svi(mine.model, mine.guide, mine.rows(x, classes()), **SHORT)
    assert not torch.allclose(mine.code_guide.distribution(x).mean, made.features(x))
    frozen = {name for name, p in mine.code_guide.named_parameters() if not p.requires_grad}
    expected = {"two heads": {"encoder.scale.weight", "encoder.scale.bias"}}
    assert frozen == expected.get(
        kind, {"unconstrained_scale"} if kind == "one covariance" else set()
    )
    new = network(made, encoder="scratch")
    assert not torch.allclose(new.code_guide.distribution(x).mean, made.features(x))
    fit_svi(new.model, new.guide, new.rows(x, classes()), **SHORT)
    if kind != "log-variances":  # there both depend on one hidden layer, which is trained
        torch.testing.assert_close(mine.code_guide.distribution(x).variance.detach(), variances)


def test_missing_values_of_x_are_encoded_as_by_the_guide():
    pair = autoencoder(missing="zeros+mask")
    x, y = draw(N, D), classes()
    x[draw(N, D, seed=4) > 1] = torch.nan
    made = network(pair)
    torch.testing.assert_close(
        made.predict(x).base_dist.logits,
        made.likelihood(made.head(pair.features(x))).base_dist.logits.detach(),
    )
    value = elbo(made.model, made.guide, made.rows(x, y))
    expected = made.predict(x).log_prob(y[:, None].double())
    torch.testing.assert_close(value, expected)
    fit_svi(made.model, made.guide, made.rows(x, y), **SHORT)


def test_rows_without_a_label_do_not_contribute():
    made, x, y = network(), draw(N, D), classes().double()
    y[10:] = torch.nan
    value = elbo(made.model, made.guide, made.rows(x, y))
    few = elbo(made.model, made.guide, made.rows(x[:10], y[:10]))
    torch.testing.assert_close(value, torch.cat([few, torch.zeros(N - 10).double()]))


def test_log_p_is_that_of_the_labels_only():
    made, x, y = network(), draw(N, D), classes()
    found = log_likelihood(made.model, made.guide, made.rows(x, y), 25)
    assert found.num_entries.tolist() == [1.0] * N
    assert found.bits_per_dimension == pytest.approx(-float(found.value.mean()) / math.log(2))
    incomplete = made.rows(torch.where(draw(N, D, seed=4) > 1, torch.nan, x), y)
    assert log_likelihood(made.model, made.guide, incomplete, 25).num_entries.tolist() == [1.0] * N


def test_labels_can_be_drawn():
    made, x = network(), draw(N, D)
    torch.manual_seed(0)
    drawn = made.model(made.rows(x, classes()), observe=False)
    assert drawn.shape == (N, 1) and set(drawn.unique().tolist()) <= {0.0, 1.0, 2.0}
    assert not torch.equal(drawn[:, 0], classes().double())


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["fine-tuned", "frozen"])
def test_captured_steps_equal_eager_steps(encoder):
    x, y = draw(N, D), classes()
    values = {}
    for capture in (False, True):
        made = network(encoder=encoder)
        fit = fit_svi(
            made.model,
            made.guide,
            made.rows(x, y),
            steps=40,
            batch_size=20,
            lr=0.01,
            seed=0,
            capture=capture,
        )
        assert fit.execution.startswith("compiled" if capture else "eager"), fit.execution
        values[capture] = fit.objective
    torch.testing.assert_close(values[True], values[False], rtol=1e-8, atol=1e-8)


# Reset


def test_reset_draws_initial_parameters_again():
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Linear(400, 300),
        nn.BatchNorm1d(300),
        nn.TransformerEncoderLayer(300, 4, 50, dropout=0.0, batch_first=True),
        Bias(300),
        SoftThreshold(300),
    )
    positions = nn.Parameter(torch.ones(3), requires_grad=False)
    layers[0].register_parameter("positions", positions)
    new = copy.deepcopy(layers)
    with torch.no_grad():
        for parameter in layers.parameters():
            if parameter.requires_grad:
                parameter.fill_(7.0)
        layers[1].running_mean.fill_(7.0)
    assert reset(layers, seed=0) is layers
    for name, value in layers.state_dict().items():
        other = new.state_dict()[name]
        if other.is_floating_point() and len(other.unique()) > 1:  # drawn
            assert not torch.equal(value, other)
            # A uniform's standard deviation, estimated twice, has this relative error.
            error = oracles.z_limit(20) * math.sqrt(2 * 0.2 / value.numel())
            torch.testing.assert_close(value.std(), other.std(), rtol=error, atol=0)
        else:
            assert torch.equal(value, other), name
    again = reset(copy.deepcopy(layers), seed=0)
    assert same(parameters(layers), parameters(again)) == set(parameters(again))


class Scaled(nn.Module):
    """A layer without ``reset_parameters``."""

    def __init__(self):
        super().__init__()
        self.linear, self.gain = nn.Linear(D, K), nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.gain * self.linear(x)


def test_layers_that_cannot_be_reset_are_named():
    layer = Scaled()
    before = parameters(layer)
    with pytest.raises(ValueError, match=r"no layer resets.*\['gain'\]; give.*reset_parameters"):
        reset(layer, seed=0)
    assert same(before, parameters(layer)) == set(before)
    pair = Autoencoder(encoder=layer, decoder=mlp(K, D), data_dim=D, latent_dim=K)
    with pytest.raises(ValueError, match=r"\['encoder.gain'\]"):
        network(pair, encoder="scratch")
    assert network(pair, encoder="fine-tuned").code_guide.encoder.gain.requires_grad


def test_frozen_layers_are_reset_and_stay_frozen():
    pair = autoencoder()
    pair.guide.encoder[0].requires_grad_(False)
    made = network(pair, encoder="scratch")
    assert same(parameters(made.code_guide), parameters(pair.guide)) == set()
    before = parameters(made.code_guide)
    fit_svi(made.model, made.guide, made.rows(draw(N, D), classes()), **SHORT)
    still = {"encoder.0.weight", "encoder.0.bias"}
    assert same(before, parameters(made.code_guide)) == still


# Invalid input


def test_models_without_their_own_encoder_are_refused():
    ppca = PPCA(D, K, seed=0)
    exact = VAE(
        decoder=mlp(K, D), likelihood=Gaussian(), data_dim=D, latent_dim=K, guide=ExactGuide(ppca)
    )
    with pytest.raises(TypeError, match=r"reads codes off a network .*this VAE is a Exact"):
        network(exact)
    tied = Autoencoder.linear(D, K, tied=True, columns="orthonormal")
    for encoder in ("fine-tuned", "frozen", "scratch"):
        with pytest.raises(ValueError, match=r"not the encoder's own .*tied=False"):
            network(tied, encoder=encoder)


def test_invalid_arguments_are_refused():
    made, x = network(), draw(N, D)
    with pytest.raises(
        ValueError, match="encoder must be one of 'fine-tuned', 'frozen', 'scratch"
    ):
        network(encoder="new")
    with pytest.raises(
        ValueError, match=r"5 and 1 columns and the same rows; .*\(60, 5\).*\(3, 1"
    ):
        made.rows(x, classes()[:3])
    with pytest.raises(ValueError, match=r"1 entries outside the categories 0, 1, ..., 2"):
        wrong = classes()
        wrong[0] = C
        fit_svi(made.model, made.guide, made.rows(x, wrong), **SHORT)
    with pytest.raises(ValueError, match=r"x must have shape \(rows, 5\)"):
        made.predict(x[:, 1:])
    empty = torch.where(torch.arange(N)[:, None] == 2, torch.nan, x)
    for call in (lambda: made.predict(empty), lambda: made.rows(empty, classes())):
        with pytest.raises(ValueError, match=r"rows with nothing observed: \[2\]"):
            call()
