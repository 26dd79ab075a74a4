"""Dictionary learning by exact steps, unrolled encoders, and what atoms are used for."""

import copy
import itertools

import numpy as np
import pytest
import torch
from sklearn.decomposition import dict_learning, sparse_encode
from torch import nn

import oracles
from ppl_vae import (
    Autoencoder,
    Bernoulli,
    Gaussian,
    PerDatumGuide,
    best_codes,
    digits,
    elbo,
    fit_dictionary,
    mlp,
)
from ppl_vae.evaluation.latent_space.atoms import atoms
from ppl_vae.inference.sparse.dictionary import SWEEPS
from ppl_vae.networks.sparse_layers import LISTA, NormalizedColumns

D, K = 6, 9
SIGMA = 0.3


def planted(seed=0, *, N=80, share=0.25, noise=0.05, width=D, number=K):
    return oracles.planted_dictionary(N, width, number, share, noise, seed)


def with_free_codes(x, latent_dim, penalty, *, sigma=SIGMA, seed=0):
    """An autoencoder with a free code for each row of x, its bias anywhere."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        decoder = nn.Sequential(NormalizedColumns(nn.Linear(latent_dim, x.shape[1]), "unit"))
    made = Autoencoder(
        decoder=decoder,
        guide=PerDatumGuide(len(x), latent_dim, covariance="delta"),
        likelihood=Gaussian(sigma),
        prior="laplace",
        penalty=penalty,
        data_dim=x.shape[1],
        latent_dim=latent_dim,
    )
    return made.double()


def parts(autoencoder):
    """W, b and the codes, as numpy has them."""
    layer = autoencoder.decoder[0]
    return [t.detach().numpy().copy() for t in (layer.weight, layer.bias, autoencoder.guide.loc)]


# The alternation


@pytest.mark.parametrize("penalty", [0.3, 1.0, 4.0])
def test_steps_are_those_of_the_slow_formulas(penalty):
    x, _ = planted(N=20)
    model = with_free_codes(x, 5, penalty)
    W, b, Z = parts(model)
    threshold, values = penalty * SIGMA**2, []

    def note():
        values.append(-oracles.dictionary_loss(x, W, b, Z, penalty, SIGMA))

    Z = oracles.lasso_sweeps(x, W, b, Z, threshold, SWEEPS)
    note()
    for _ in range(3):
        W, b = oracles.dictionary_sweep(x, W, b, Z)
        note()
        Z = oracles.lasso_sweeps(x, W, b, Z, threshold, SWEEPS)
        note()
    fit = fit_dictionary(model, x, max_iterations=3)
    assert fit.steps == 3 and fit.stopped == "after max_iterations=3"
    # The last codes are swept to their end.
    np.testing.assert_allclose(fit.objective[:-1], values[:-1], rtol=1e-10)
    assert fit.objective[-1] >= values[-1] - 1e-12
    found_W, found_b, found_Z = parts(model)
    np.testing.assert_allclose(found_W, W, atol=1e-10)
    np.testing.assert_allclose(found_b, b, atol=1e-10)
    np.testing.assert_allclose(
        found_Z, oracles.lasso_sweeps(x, W, b, Z, threshold, 500), atol=1e-7
    )


@pytest.mark.parametrize(("penalty", "sigma"), [(0.1, 1.0), (0.5, 0.3), (3.0, 0.3), (30.0, 0.1)])
@pytest.mark.parametrize("latent_dim", [1, 4, 12])
def test_the_objective_never_falls_and_is_the_pairs_own(penalty, sigma, latent_dim):
    x, _ = planted(seed=1)
    x = x + 3.0
    model = with_free_codes(x, latent_dim, penalty, sigma=sigma)
    fit = fit_dictionary(model, x, max_iterations=20)
    size = 1 + float(fit.objective.abs().max())
    assert float(fit.objective.diff().min()) > -1e-12 * size
    assert len(fit.objective) == len(fit.elapsed) == 1 + 2 * fit.steps
    own = elbo(model.model, model.guide, x)
    assert float(fit.objective[-1]) == pytest.approx(float(own.mean()), abs=1e-11 * size)
    W, b, Z = parts(model)
    loss = oracles.dictionary_loss(x, W, b, Z, penalty, sigma)
    assert float(fit.objective[-1]) == pytest.approx(-loss, abs=1e-11 * size)
    np.testing.assert_allclose(np.linalg.norm(W, axis=0), 1.0, rtol=1e-12)


def test_the_codes_it_ends_with_are_scikit_learns():
    x, _ = planted(seed=2)
    model = with_free_codes(x, 12, 1.0)
    fit = fit_dictionary(model, x, max_iterations=30)
    W, b, Z = parts(model)
    how = {"algorithm": "lasso_cd", "alpha": 1.0 * SIGMA**2, "max_iter": 100_000}
    expected = sparse_encode(x - b, W.T.copy(), **how)
    np.testing.assert_allclose(Z, expected, atol=1e-4)
    best = best_codes(model, x, tolerance=1e-7).log_joint.mean()
    assert float(fit.objective[-1]) == pytest.approx(float(best), abs=1e-7)


def test_best_codes_of_digits_are_scikit_learns_whatever_bias_and_noise():
    x, sigma, penalty = digits()[::40], 0.1, 10.0
    model = Autoencoder.linear(
        64,
        100,
        columns="unit",
        prior="laplace",
        penalty=penalty,
        likelihood=Gaussian(sigma),
        seed=0,
    )
    model = model.double().center(x)
    layer = model.decoder[0]
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    assert abs(bias).max() > 0.5
    how = {"algorithm": "lasso_cd", "alpha": penalty * sigma**2, "max_iter": 100_000}
    expected = sparse_encode(x - bias, weight.T.copy(), **how)
    found = best_codes(model, x, tolerance=1e-4).codes
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_array_equal(found == 0, expected == 0)
    assert 0.3 < float((found == 0).double().mean()) < 0.9


def test_best_codes_go_by_slopes_where_columns_are_free_or_cells_are_missing():
    x, _ = planted(seed=10, N=6)
    free = Autoencoder.linear(D, K, prior="laplace", likelihood=Gaussian(SIGMA), seed=0).double()
    with torch.no_grad():
        free.decoder[0].weight.mul_(torch.linspace(0.5, 2.0, K).double())
    W, b = (p.detach().numpy() for p in free.decoder.parameters())
    how = {"algorithm": "lasso_cd", "alpha": SIGMA**2, "max_iter": 100_000}
    expected = sparse_encode(x - b, W.T.copy(), **how)
    np.testing.assert_allclose(best_codes(free, x, tolerance=1e-4).codes, expected, atol=1e-4)
    model = with_free_codes(x, K, 1.0)
    W, b, _ = parts(model)
    x[:, 2] = np.nan
    rest = np.delete(np.arange(D), 2)
    expected = sparse_encode((x - b)[:, rest], W[rest].T.copy(), **how)
    np.testing.assert_allclose(best_codes(model, x, tolerance=1e-4).codes, expected, atol=1e-4)


def test_best_codes_of_float32_are_float32_and_do_not_wait_for_more():
    x, _ = planted(seed=11, N=20)
    model = with_free_codes(x, K, 10.0, sigma=0.1)
    exact = best_codes(model, x, tolerance=1e-6)
    found = best_codes(model.float(), x)
    assert found.codes.dtype == torch.float32 and bool(found.converged.all())
    np.testing.assert_allclose(found.codes, exact.codes, atol=1e-4)
    assert float(found.log_joint.mean()) == pytest.approx(float(exact.log_joint.mean()), rel=1e-4)


def test_where_it_ends_no_atom_and_no_bias_can_be_bettered():
    x, _ = planted(seed=3)
    model = with_free_codes(x, 5, 2.0)
    fit = fit_dictionary(model, x, tol=1e-12, max_iterations=20_000)
    assert fit.stopped.startswith("converged")
    W, b, Z = parts(model)
    left = x - b - Z @ W.T
    np.testing.assert_allclose(left.mean(0), 0.0, atol=1e-5)
    for k in range(5):
        u = Z[:, k] @ (left + np.outer(Z[:, k], W[:, k]))
        np.testing.assert_allclose(u / np.linalg.norm(u), W[:, k], atol=1e-5)


PENALTY = 0.3


def scikit_learns_end(x, W):
    """The mean loss at which scikit-learn's alternation ends that starts from these columns."""
    codes = np.linalg.lstsq(W, x.T, rcond=None)[0].T.copy()
    how = {"alpha": PENALTY, "method": "cd", "max_iter": 1000, "tol": 1e-10, "random_state": 0}
    how |= {"dict_init": W.T.copy(), "code_init": codes, "method_max_iter": 10_000}
    *_, errors = dict_learning(x, W.shape[1], **how)
    return errors[-1] / len(x)


def ends(seed, number, share):
    """Where our alternation and scikit-learn's end from one start, and scikit-learn's from there.

    x stands beside -x, so that the best b is zero all the way, which scikit-learn's is too.
    """
    x, _ = planted(seed, N=100, share=share, width=8, number=number)
    x = np.concatenate([x, -x])
    model = with_free_codes(x, number, PENALTY, sigma=1.0, seed=seed)
    with torch.no_grad():
        model.decoder[0].bias.zero_()
    theirs = scikit_learns_end(x, parts(model)[0])
    fit = fit_dictionary(model, x, tol=1e-7)
    assert abs(parts(model)[1]).max() < 1e-14
    constant = 8 / 2 * np.log(2 * np.pi) + number * np.log(2 / PENALTY)
    ours = -float(fit.objective[-1]) - constant
    return ours, theirs, scikit_learns_end(x, parts(model)[0])


@pytest.mark.parametrize("seed", range(3))
def test_it_ends_where_scikit_learn_ends(seed):
    ours, theirs, continued = ends(seed, number=5, share=0.3)
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert ours == pytest.approx(continued, abs=1e-5)


@pytest.mark.slow
def test_over_complete_it_ends_in_one_of_the_optima_of_scikit_learn():
    # From one start they may end in different optima; neither betters where the other stands.
    found = np.array([ends(seed, number=12, share=0.2) for seed in range(30)])
    ours, theirs, continued = found.T
    less = ours - theirs
    error = less.std(ddof=1) / np.sqrt(len(less))
    print(f"equal {(abs(less) < 1e-5).sum()}, ours lower {(less < -1e-5).sum()} of {len(less)}")
    print(f"ours less scikit-learn's: {less.mean():.5f} ± {error:.5f} of {theirs.mean():.5f}")
    np.testing.assert_allclose(continued, ours, atol=1e-4)


def test_a_planted_dictionary_is_found():
    x, W = planted(seed=0, N=400, share=0.2, width=8, number=6, noise=0.02)
    model = with_free_codes(x, 6, 1.0, sigma=0.2)
    fit_dictionary(model, x)
    cosines = abs(parts(model)[0].T @ W)
    assert sorted(cosines.argmax(0)) == list(range(6))
    assert cosines.max(0).min() > 0.99


def test_learned_dictionaries_have_more_zeros_with_more_penalty():
    x, _ = planted(seed=4, N=30)
    shares = []
    for penalty in (0.1, 0.5, 2.0, 6.0):
        model = with_free_codes(x, 12, penalty)
        fit_dictionary(model, x, max_iterations=30)
        shares.append((parts(model)[2] == 0).mean())
    assert all(low < high for low, high in itertools.pairwise(shares))


def test_a_learned_dictionary_cannot_gain_by_scaling_codes_against_columns():
    x, _ = planted(seed=5)
    model = with_free_codes(x, 5, 1.0)
    fit = fit_dictionary(model, x, max_iterations=50)
    for factor in (0.1, 0.9, 1.1, 10.0):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.decoder[0].free.div_(factor)
            other.guide.loc.mul_(factor)
        assert elbo(other.model, other.guide, x).mean() < fit.objective[-1] - 1e-3


# Atoms that are not used


def test_an_atom_that_no_datum_uses_is_pointed_at_what_is_explained_worst():
    x, _ = planted(seed=6, width=D - 1)
    x = np.concatenate([x, np.zeros((len(x), 1))], 1)  # nothing along the last axis
    model = with_free_codes(x, 3, 0.5)
    with torch.no_grad():
        model.decoder[0].free[:, 0] = torch.eye(D)[-1].double()
        model.decoder[0].free[-1, 1:] = 0.0
        model.decoder[0].bias[-1] = 0.0
    fit = fit_dictionary(model, x, max_iterations=40)
    W, _, Z = parts(model)
    assert abs(W[-1]).max() < 1e-12 and (Z[:, 0] != 0).any()
    assert any("1 times an atom that no datum used was pointed at" in note for note in fit.notes)
    assert float(fit.objective.diff().min()) > -1e-12


def test_atoms_that_would_help_nobody_are_left_and_counted():
    x, _ = planted(seed=7)
    centred = np.linalg.norm(x - x.mean(0), axis=1).max()
    model = with_free_codes(x, 4, 1.001 * centred / SIGMA**2)
    before = parts(model)[0]
    fit = fit_dictionary(model.center(x), x)
    W, _, Z = parts(model)
    assert (Z == 0).all() and fit.stopped.startswith("converged")
    np.testing.assert_allclose(W, before, atol=1e-15)
    assert "4 of 4 atoms are used by no datum" in fit.notes
    assert not any("pointed" in note for note in fit.notes)
    assert "no bound on log p(x)" in repr(fit)


def test_more_unused_atoms_than_data_do_not_matter():
    x, _ = planted(seed=8, N=3)
    model = with_free_codes(x, 12, 0.5)
    fit = fit_dictionary(model, x, max_iterations=30)
    assert float(fit.objective.diff().min()) > -1e-12
    assert np.isfinite(parts(model)[0]).all()


# What it takes


def test_an_encoder_is_left_as_it_is_and_float32_is_too():
    x, _ = planted(seed=9)
    model = Autoencoder.linear(
        D, K, columns="unit", prior="laplace", penalty=0.5, likelihood=Gaussian(SIGMA), seed=0
    )
    encoder = copy.deepcopy(model.guide.state_dict())
    fit = fit_dictionary(model, x, max_iterations=20)
    assert all(torch.equal(v, encoder[k]) for k, v in model.guide.state_dict().items())
    assert any("the guide is as it was" in note for note in fit.notes)
    assert fit.objective.dtype == torch.float64
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    double = with_free_codes(x, K, 0.5)
    with torch.no_grad():
        start = Autoencoder.linear(D, K, columns="unit", seed=0).decoder[0]
        double.decoder[0].free.copy_(start.free)
        double.decoder[0].bias.copy_(start.bias)
    again = fit_dictionary(double, torch.as_tensor(x), max_iterations=20)
    np.testing.assert_allclose(fit.objective, again.objective, rtol=1e-4)
    assert not any("the guide is as it was" in note for note in again.notes)


def linear(**how):
    return Autoencoder.linear(
        D, K, **({"columns": "unit", "prior": "laplace", "likelihood": Gaussian(1.0)} | how)
    )


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: linear(columns="free"), "the decoder must be one linear layer with unit columns"),
        (
            lambda: Autoencoder.mlp(D, K, hidden=(3,), columns="unit", prior="laplace"),
            "the decoder must be one linear layer with unit columns",
        ),
        (lambda: linear(prior="flat"), "prior must be 'laplace' for sparse codes; it is 'flat'"),
        (
            lambda: linear(likelihood=Gaussian("shared")),
            "likelihood must be a Gaussian of fixed scale, such as .*; got 'shared'",
        ),
        (
            lambda: linear(likelihood=Bernoulli(soft_targets=True)),
            "likelihood must be a Gaussian of fixed scale, such as .*; got 'Bernoulli'",
        ),
        (
            lambda: with_free_codes(np.zeros((7, D)), K, 1.0),
            "the guide has a code for each of 7 rows, x has 80; make one for these data",
        ),
    ],
)
def test_what_is_no_dictionary_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        fit_dictionary(make(), planted()[0])


def test_bad_arguments_are_refused():
    x, _ = planted()
    model = with_free_codes(x, K, 1.0)
    with pytest.raises(ValueError, match="tol must be positive, in nats per datum; got 0"):
        fit_dictionary(model, x, tol=0.0)
    with pytest.raises(ValueError, match="max_iterations must be a whole number >= 1; got 0"):
        fit_dictionary(model, x, max_iterations=0)
    x[0, 0] = np.nan
    with pytest.raises(ValueError, match="x has 1 missing entries: over columns of length one"):
        fit_dictionary(model, x)


# Unrolled encoders


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_an_unrolled_encoder_begins_as_ista(steps):
    x, _ = planted()
    model = with_free_codes(x, K, 1.0).center(x)
    W, b, _ = parts(model)
    encoder = LISTA(model.decoder[0], 0.2, steps=steps)
    found = encoder(torch.as_tensor(x)).detach()
    expected = oracles.ista(x, W, b, 0.2, steps)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_array_equal(found == 0, expected == 0)
    assert 0 < (expected == 0).mean() < 1


def test_enough_unrolled_steps_are_the_lasso():
    x, _ = planted()
    model = with_free_codes(x, K, 1.0).center(x)
    encoder = LISTA(model.decoder[0], SIGMA**2, steps=5000)
    best = best_codes(model, x, tolerance=1e-7).codes
    with torch.no_grad():
        np.testing.assert_allclose(encoder(torch.as_tensor(x)), best, atol=1e-5)


def test_every_part_of_an_unrolled_encoder_learns():
    x, _ = planted()
    model = with_free_codes(x, K, 1.0)
    encoder = LISTA(model.decoder[0], SIGMA**2)
    encoder(torch.as_tensor(x)).square().sum().backward()
    assert {n for n, _ in encoder.named_parameters()} == {
        *("read.weight", "read.bias", "mix", "log_threshold")
    }
    assert all(float(p.grad.abs().sum()) > 0 for p in encoder.parameters())
    assert model.decoder[0].free.grad is None
    with pytest.raises(ValueError, match="threshold must be positive, as the lasso's is; got 0"):
        LISTA(model.decoder[0], 0.0)
    with pytest.raises(ValueError, match="steps must be a whole number >= 1; got 0"):
        LISTA(model.decoder[0], 1.0, steps=0)


# Atoms by use


def test_atoms_stand_in_the_order_of_their_use():
    x, _ = planted()
    model = with_free_codes(x, K, 1.0).center(x)
    W, b, _ = parts(model)
    found = atoms(model, x, tolerance=1e-7)
    codes = sparse_encode(x - b, W.T.copy(), algorithm="lasso_cd", alpha=SIGMA**2, max_iter=10**5)
    order = np.argsort(-abs(codes).mean(0), kind="stable")
    assert found.index.tolist() == order.tolist()
    np.testing.assert_allclose(found.mean_abs, abs(codes).mean(0)[order], atol=1e-5)
    np.testing.assert_allclose(found.usage, (codes != 0).mean(0)[order])
    signs = np.where(codes.sum(0) < 0, -1, 1)
    np.testing.assert_allclose(found.atoms, (W * signs).T[order], rtol=1e-12)
    assert (signs < 0).any() and (signs > 0).any()
    assert f"a datum uses {(codes != 0).sum(1).mean():.1f} of them, 0 are used by none" in repr(
        found
    )


def test_networks_have_no_atoms():
    deep = Autoencoder(encoder=mlp(D, K), decoder=mlp(K, D, (3,)), data_dim=D, latent_dim=K)
    with pytest.raises(ValueError, match="only a decoder of one linear layer"):
        atoms(deep, planted()[0])
