"""VAEs made from data: standardised inside, with log p in the units of the data."""

import copy
import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_wine

import lineages
import oracles
from ppl_vae import fit_closed_form, fit_svi
from ppl_vae.evaluation import collapse, impute, log_likelihood
from ppl_vae.likelihoods import Gaussian, OptimalGaussian
from ppl_vae.likelihoods.discrete import (
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    Multinomial,
    Poisson,
)
from ppl_vae.likelihoods.distributions import StandardizedNormal
from ppl_vae.models import PPCA, VAE, Autoencoder, load, save
from ppl_vae.models.topics import topic_vae
from ppl_vae.objectives import elbo, log_weights

UNITS = torch.tensor([1e-6, 0.2, 1.0, 30.0, 654.0, 1e6]).double()
GAUSSIANS = {
    "shared": lambda: Gaussian("shared"),
    "per-dim": lambda: Gaussian("per-dim"),
    "network": lambda: Gaussian("network"),
    "optimal": OptimalGaussian,
}


def table(missing=0.0):
    x = lineages.table() / lineages.table().std(0) + 3
    x = oracles.with_missing_values(x, missing, seed=3) if missing else x
    return torch.from_numpy(x)


def like(x, likelihood=None, **options):
    return VAE.like(x, 2, **({"hidden": (8,), "likelihood": likelihood, "seed": 0} | options))


def fitted(vae, x, steps=30, **options):
    options = {"lr": 1e-2, "batch_size": 50, "seed": 0, "capture": False} | options
    return fit_svi(vae.model, vae.guide, x, steps=steps, **options)


@pytest.mark.parametrize("missing", [0.0, 0.2])
@pytest.mark.parametrize("name", GAUSSIANS)
def test_a_change_of_units_shifts_log_p_by_the_log_jacobian_only(name, missing):
    x = table(missing)
    values = []
    for factors in (torch.ones(6).double(), UNITS):
        vae = like(x * factors, GAUSSIANS[name]())
        fit = fitted(vae, x * factors)
        weights = log_weights(vae.model, vae.guide, x * factors, 3, seed=1)
        jacobian = (~x.isnan()).double() @ factors.log()
        values.append((weights + jacobian, vae.sample(5, seed=1) / factors, fit.notes))
    torch.testing.assert_close(values[0][0], values[1][0], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(values[0][1], values[1][1], rtol=1e-8, atol=1e-8)
    assert not any("standard deviations from" in note for note in values[1][2])


def test_log_p_given_z_is_the_density_of_the_data():
    x = table() * UNITS
    for make in GAUSSIANS.values():
        vae = like(x, make())
        if vae.likelihood.kind == "optimal":
            fitted(vae, x, steps=1)
        z = torch.randn(len(x), 2, dtype=torch.float64)
        given = vae.decode(z)
        normal = torch.distributions.Normal(given.mean, given.variance.sqrt())
        torch.testing.assert_close(given.log_prob(x), normal.log_prob(x).sum(-1))
    fixed = like(x, Gaussian(0.3))
    torch.testing.assert_close(fixed.decode(z).variance, torch.full_like(x, 0.09))


def test_a_standardized_normal_is_a_normal_that_does_not_overflow():
    loc, scale = torch.randn(4, 3).double(), torch.rand(3).double() + 0.5
    origin, unit = torch.tensor([1.0, -2.0, 0.0]).double(), torch.tensor([3.0, 0.1, 1.0]).double()
    ours = StandardizedNormal(loc, scale, origin, unit)
    theirs = torch.distributions.Normal(origin + unit * loc, unit * scale)
    x = torch.randn(5, 4, 3).double()
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x))
    torch.testing.assert_close(ours.expand([5, 4, 3]).log_prob(x), theirs.log_prob(x))
    torch.testing.assert_close(ours.mean, theirs.mean)
    one = torch.ones(1)
    large = StandardizedNormal(0 * one, one, 0 * one, 1e30 * one)
    expected = -0.5 - math.log(1e30) - math.log(2 * math.pi) / 2
    assert large.log_prob(torch.tensor([1e30])).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("factor", [pytest.param(1e-30, marks=pytest.mark.slow), 1e30])
def test_single_precision_of_any_scale_trains(factor):
    x = (table() * factor).float()
    vae = like(x)
    assert vae.guide.inputs.scale.dtype == torch.float32
    values = fitted(vae, x, steps=150).objective + 6 * math.log(factor)
    reference = fitted(like(table().float()), table().float(), steps=150).objective
    assert values[-20:].mean() > values[:5].mean() + 0.3
    assert values[-20:].mean() == pytest.approx(float(reference[-20:].mean()), abs=0.05)


def test_training_starts_at_the_columns_means_with_half_their_variance():
    x = table() * UNITS
    vae = like(x)
    with torch.no_grad():
        vae.decoder[-1].weight.zero_()
    given = vae.decode(torch.zeros(1, 2))
    torch.testing.assert_close(given.mean[0], x.mean(0))
    torch.testing.assert_close(given.variance[0], x.var(0, correction=0) / 2)
    per_dim = like(x, Gaussian("per-dim")).likelihood.scale
    torch.testing.assert_close(per_dim, torch.ones(6).double())


def test_the_encoder_is_given_the_column_mean_for_a_missing_value():
    x = table(0.2) * UNITS
    for missing in ("zeros", "zeros+mask"):
        vae = like(x, missing=missing)
        mask = ~x.isnan()
        filled = torch.where(mask, x, x.nanmean(0))
        ours = vae.guide.distribution(x.nan_to_num(nan=7e9), mask=mask).mean
        inner = (filled - x.nanmean(0)) / vae.guide.inputs.scale
        inner = inner if missing == "zeros" else torch.cat([inner, mask.double()], 1)
        torch.testing.assert_close(ours, vae.guide.encoder(inner)[:, :2])
        fit = fitted(vae, x)
        assert bool(fit.objective.isfinite().all())
    filled = impute(vae.model, vae.guide, x[:20], num_samples=200, seed=0)
    off = (filled.mean - x.nanmean(0)) / vae.guide.inputs.scale
    assert off.abs().max() < 10 and bool((filled.sd[~mask[:20]] > 0).all())


def same_buffers(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    return all(torch.allclose(ours[k], theirs[k], rtol=1e-12, atol=1e-12) for k in ours)


def test_a_table_may_have_any_type(tmp_path):
    x = (table(0.1) * UNITS).numpy()
    whole = like(x)
    assert same_buffers(whole, like([x[:70], x[70:]]))
    assert same_buffers(whole, like(x[k : k + 50] for k in (0, 50, 100, 150)))
    np.save(tmp_path / "x.npy", x)
    assert same_buffers(whole, like(np.load(tmp_path / "x.npy", mmap_mode="r")))
    mask = ~np.isnan(x)
    assert same_buffers(whole, like(np.where(mask, x, 1e9), mask=mask))
    assert like(torch.from_numpy(x).float()).decoder[0].weight.dtype == torch.float32
    assert like(np.arange(24).reshape(6, 4)).decoder[0].weight.dtype == torch.float32


def test_the_standardization_is_saved_and_copied(tmp_path):
    x = table() * UNITS
    vae = like(x, Gaussian("per-dim"))
    fitted(vae, x)
    for other in (load(save(vae, tmp_path)), copy.deepcopy(vae)):
        assert same_buffers(vae, other)
        ours, theirs = (log_weights(v.model, v.guide, x, 2, seed=0) for v in (vae, other))
        assert torch.equal(ours, theirs)
    fresh = VAE.mlp(6, 2, hidden=(8,), likelihood=Gaussian("per-dim"), inputs="standardized")
    fresh.double().load_state_dict(vae.state_dict())
    assert torch.equal(fresh.reconstruct(x), vae.reconstruct(x))


@pytest.mark.slow
def test_steps_are_captured_and_do_not_change_the_buffers():
    x = table() * UNITS
    vae = like(x, Gaussian("per-dim"))
    before = vae.guide.inputs.loc.clone()
    fit = fitted(vae, x, steps=20, capture=True)
    assert fit.execution.startswith("compiled"), fit.execution
    assert torch.equal(vae.guide.inputs.loc, before)


def test_constant_columns_are_noted_and_too_wide_a_range_is_refused(tmp_path):
    x = table() * UNITS
    x[:, 2] = 0.1
    vae = like(x)
    assert vae.guide.inputs.scale[2] == 1 and vae.likelihood.unit[2] == 1
    (note,) = fitted(vae, x).notes
    assert note == "constant columns, which are not standardised: 2"
    assert note in load(save(vae, tmp_path)).guide.inputs.notes()
    with pytest.raises(ValueError, match=r"standard deviations of columns \[0, 1, 2"):
        like(table() * 1e-200)
    empty = table()
    empty[:, 2] = torch.nan
    with pytest.raises(ValueError, match=r"columns with nothing observed: \[2\]"):
        like(empty)


def test_centering_a_standardized_model_equals_making_it_from_data():
    x = table() * UNITS
    sizes = {"hidden": (8,), "likelihood": Gaussian("shared", initial=0.5**0.5)}
    vae = VAE.mlp(6, 2, **sizes, inputs="standardized", seed=0).double()
    assert same_buffers(vae.center(x), like(x))
    with pytest.raises(ValueError, match="inputs must be one of 'auto', 'identity', 'log1p'; got"):
        Autoencoder.mlp(6, 2, inputs="standardized")
    with pytest.raises(ValueError, match="it has 5 columns"):
        vae.center(x[:, :5])


# Other likelihoods


def rates(top=2000.0):
    rng = np.random.default_rng(0)
    z, w = rng.normal(size=(300, 2)), rng.normal(size=(2, 8))
    return rng.poisson(np.minimum(np.exp(0.6 * z @ w + rng.uniform(0, 7, 8)), top)).astype("f4")


@pytest.mark.parametrize("lr", [1e-4, 1e-2])
@pytest.mark.parametrize("make", [Poisson, Multinomial])
def test_counts_up_to_thousands_train_at_any_learning_rate(make, lr):
    x = rates()
    assert x.max() > 1500
    plain = VAE.mlp(8, 2, likelihood=make(), seed=0)
    for vae in (plain, VAE.like(x, 2, likelihood=make(), seed=0)):
        fit = fitted(vae, x, steps=60, lr=lr)
        assert fit.notes == ()
        assert fit.objective[-5:].mean() > fit.objective[:5].mean()
    # Made from data, it starts at an objective that the other has not reached yet.
    assert fit.objective[0] > -500


def test_encoders_of_counts_are_given_their_logarithms():
    x = torch.from_numpy(rates())
    for made in (
        VAE.mlp(8, 2, likelihood=Poisson(), seed=0),
        VAE.conv((1, 2, 4), 2, likelihood=Poisson(), channels=(3,), seed=0),
        Autoencoder.mlp(8, 2, likelihood=Poisson(), seed=0),
    ):
        expected = made.guide.encoder(x.log1p())[:, :2]
        torch.testing.assert_close(made.guide.distribution(x).mean, expected)
    raw = VAE.mlp(8, 2, likelihood=Poisson(), inputs="identity", seed=0)
    torch.testing.assert_close(raw.guide.distribution(x).mean, raw.guide.encoder(x)[:, :2])
    inner = VAE.like(x, 2, likelihood=Poisson(), seed=0).guide.inputs(x)
    logs = x.log1p()
    torch.testing.assert_close(inner, (logs - logs.mean(0)) / logs.std(0, correction=0))
    vae = Autoencoder.mlp(8, 2, likelihood=Poisson(), seed=0).as_vae()
    assert vae.guide.inputs is not None


def test_loaded_encoders_are_given_the_same_inputs(tmp_path):
    x = torch.from_numpy(rates())
    raw = VAE.mlp(8, 2, likelihood=Poisson(), inputs="identity", seed=0)
    loaded = load(save(raw, tmp_path))
    torch.testing.assert_close(loaded.guide.distribution(x).mean, raw.guide.encoder(x)[:, :2])
    for made in (VAE.mlp(8, 2, likelihood=Poisson()), topic_vae(8, 2)):
        again = load(save(made, tmp_path))
        torch.testing.assert_close(again.features(x), made.features(x))


DISCRETE = {
    "bernoulli": (Bernoulli, lambda u: (u > 0.7).double()),
    "continuous": (ContinuousBernoulli, lambda u: u),
    "categorical": (lambda: Categorical(4), lambda u: (4 * u).floor()),
    "poisson": (Poisson, lambda u: (50 * u * u).floor()),
    "multinomial": (Multinomial, lambda u: (50 * u * u).floor()),
}


@pytest.mark.parametrize("name", DISCRETE)
def test_other_likelihoods_start_at_the_columns_means(name):
    make, change = DISCRETE[name]
    x = change(torch.rand(60, 5, generator=torch.Generator().manual_seed(0)).double())
    vae = VAE.like(x, 2, likelihood=make(), hidden=(8,), seed=0)
    inner = vae.guide.inputs(x)
    assert inner.mean(0).abs().max() < 1e-12
    scale = torch.ones(5).double() if vae.likelihood.bounded else inner.std(0, correction=0)
    torch.testing.assert_close(vae.guide.inputs.scale if vae.likelihood.bounded else scale, scale)
    torch.testing.assert_close(scale, torch.ones_like(scale))
    bias = vae.decoder[-1].bias.detach()
    features = vae.likelihood.features(x)
    half_weight = torch.full_like(features[0], 0.5 / len(x))
    outputs = vae.likelihood.initial_outputs(features.mean(0), half_weight)
    torch.testing.assert_close(bias, outputs)
    fit = fitted(vae, x)
    assert fit.objective[-5:].mean() > fit.objective[0]


def test_data_outside_the_support_are_refused():
    with pytest.raises(ValueError, match="entries outside the counts 0, 1, 2"):
        like(table(), Poisson())


# Fits of other VAEs to such columns


def test_a_fit_to_columns_of_mixed_units_notes_the_remedy():
    x = load_wine().data
    for vae in (VAE.mlp(13, 2, seed=0).double(), VAE.mlp(13, 2, seed=0).double().center(x)):
        (note,) = fitted(vae, x, steps=2).notes
        assert note.startswith("the columns of x have standard deviations from 0.124 to 314")
        assert "VAE.like(x, latent_dim) standardises them internally" in note
    y = table()
    assert fitted(VAE.mlp(6, 2, seed=0).double(), y, steps=2).notes == ()
    for factor in (1e-6, 1e6):
        (note,) = fitted(VAE.mlp(6, 2, seed=0).double(), factor * y, steps=2).notes
        assert "VAE.like" in note
    assert fitted(like(y * UNITS), y * UNITS, steps=2).notes == ()


def test_grey_values_are_not_in_mixed_units():
    x = np.random.default_rng(0).uniform(size=(100, 6)) ** np.array([1, 1, 1, 1, 1, 400])
    assert x.std(0).max() > 10 * x.std(0).min() or x.std(0).min() < 0.03
    assert fitted(VAE.mlp(6, 2, seed=0).double(), x, steps=2).notes == ()


def test_the_threshold_of_collapse_is_in_the_units_of_the_noise():
    x = table() * UNITS
    vae = like(x)
    found = collapse(vae.model, vae.guide, x, seed=0).spectrum
    expected = np.linalg.eigvalsh(np.corrcoef(x.numpy().T))[::-1]
    np.testing.assert_allclose(found.eigenvalues, expected, atol=1e-9)
    assert found.standardized and found.noise["model"] == pytest.approx(0.5)


# Real tables


def held_out(x, num_test, seed=0):
    rows = np.random.default_rng(seed).permutation(len(x))
    return x[rows[num_test + 20 :]], x[rows[num_test : num_test + 20]], x[rows[:num_test]]


@pytest.mark.slow
@pytest.mark.parametrize("load_table", [load_wine, load_breast_cancer])
def test_on_raw_tables_the_fit_is_near_the_best_ppca_of_standardised_columns(load_table):
    x = load_table().data
    train, val, test = held_out(x, 38)
    mean, sd = train.mean(0), train.std(0)
    ppca = PPCA.like((train - mean) / sd, 3, seed=0)
    fit_closed_form(ppca, (train - mean) / sd)
    exact = ppca.log_likelihood((test - mean) / sd).mean().item() - np.log(sd).sum()
    vae = VAE.like(train, 3, seed=0)
    options = {"steps": 1500, "x_val": val, "patience": 20, "batch_size": None}
    fitted(vae, train, **options)
    found = log_likelihood(vae.model, vae.guide, test, 500, refine=100, seed=0)
    assert found.mean > exact - 2
    plain = VAE.mlp(x.shape[1], 3, seed=0).double().center(train)
    fitted(plain, train, **options)
    assert elbo(plain.model, plain.guide, test, seed=0).mean() < found.mean - 100
