"""Dictionary learning by alternating updates, against explicit formulas and scikit-learn."""

import copy
import itertools

import numpy as np
import oracles
import pytest
import torch
from dictionaries import SIGMA, D, K, parts, planted, sklearn_lasso, with_free_codes
from sklearn.decomposition import dict_learning

from ppl_vae import Autoencoder, Bernoulli, Gaussian, elbo
from ppl_vae.inference import best_codes, fit_dictionary
from ppl_vae.inference.sparse.dictionary import CODE_SWEEPS

# Alternating updates


@pytest.mark.parametrize("penalty", [0.3, 1.0, 4.0])
def test_steps_match_the_explicit_formulas(penalty):
    x, _ = planted(N=20)
    model = with_free_codes(x, 5, penalty)
    W, b, Z = parts(model)
    threshold, values = penalty * SIGMA**2, []

    def note():
        values.append(-oracles.dictionary_loss(x, W, b, Z, penalty, SIGMA))

    Z = oracles.lasso_sweeps(x, W, b, Z, threshold, CODE_SWEEPS)
    note()
    for _ in range(3):
        W, b = oracles.dictionary_sweep(x, W, b, Z)
        note()
        Z = oracles.lasso_sweeps(x, W, b, Z, threshold, CODE_SWEEPS)
        note()
    fit = fit_dictionary(model, x, max_iterations=3)
    assert fit.steps == 3 and fit.stopped == "after max_iterations=3"
    # The final codes are swept to convergence.
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
def test_the_objective_is_monotone_and_equals_the_elbo_of_the_pair(penalty, sigma, latent_dim):
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


def test_the_final_codes_match_scikit_learn():
    x, _ = planted(seed=2)
    model = with_free_codes(x, 12, 1.0)
    fit = fit_dictionary(model, x, max_iterations=30)
    W, b, Z = parts(model)
    expected = sklearn_lasso(x - b, W, SIGMA**2)
    np.testing.assert_allclose(Z, expected, atol=1e-4)
    best = best_codes(model, x, tolerance=1e-7).log_joint.mean()
    assert float(fit.objective[-1]) == pytest.approx(float(best), abs=1e-7)


def test_atoms_and_bias_are_stationary_at_the_end():
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


def sklearn_loss(x, W):
    """The mean loss of scikit-learn's dictionary learning, started from these columns."""
    codes = np.linalg.lstsq(W, x.T, rcond=None)[0].T.copy()
    *_, errors = dict_learning(
        x,
        W.shape[1],
        alpha=PENALTY,
        method="cd",
        max_iter=1000,
        tol=1e-10,
        random_state=0,
        dict_init=W.T.copy(),
        code_init=codes,
        method_max_iter=10_000,
    )
    return errors[-1] / len(x)


def losses(seed, number, share):
    """The losses of ours and of scikit-learn's from one start, and of scikit-learn's from our end.

    The data contain x and -x, so that the optimal b is always zero, as in scikit-learn.
    """
    x, _ = planted(seed, N=100, share=share, width=8, number=number)
    x = np.concatenate([x, -x])
    model = with_free_codes(x, number, PENALTY, sigma=1.0, seed=seed)
    with torch.no_grad():
        model.decoder[0].bias.zero_()
    theirs = sklearn_loss(x, parts(model)[0])
    fit = fit_dictionary(model, x, tol=1e-7)
    assert abs(parts(model)[1]).max() < 1e-14
    constant = 8 / 2 * np.log(2 * np.pi) + number * np.log(2 / PENALTY)
    ours = -float(fit.objective[-1]) - constant
    return ours, theirs, sklearn_loss(x, parts(model)[0])


@pytest.mark.parametrize("seed", range(3))
def test_the_loss_matches_scikit_learn(seed):
    ours, theirs, continued = losses(seed, number=5, share=0.3)
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert ours == pytest.approx(continued, abs=1e-5)


@pytest.mark.slow
def test_overcomplete_optima_are_stationary_for_scikit_learn():
    # They may reach different optima from one start, but scikit-learn cannot improve ours.
    found = np.array([losses(seed, number=12, share=0.2) for seed in range(30)])
    ours, theirs, continued = found.T
    difference = ours - theirs
    error = difference.std(ddof=1) / np.sqrt(len(difference))
    print(
        f"equal {(abs(difference) < 1e-5).sum()}, ours lower {(difference < -1e-5).sum()} of "
        f"{len(difference)}"
    )
    print(
        f"ours minus scikit-learn's: {difference.mean():.5f} ± {error:.5f}, mean "
        f"{theirs.mean():.5f}"
    )
    np.testing.assert_allclose(continued, ours, atol=1e-4)


def test_a_planted_dictionary_is_recovered():
    x, W = planted(seed=0, N=400, share=0.2, width=8, number=6, noise=0.02)
    model = with_free_codes(x, 6, 1.0, sigma=0.2)
    fit_dictionary(model, x)
    cosines = abs(parts(model)[0].T @ W)
    assert sorted(cosines.argmax(0)) == list(range(6))
    assert cosines.max(0).min() > 0.99


def test_codes_are_sparser_with_a_larger_penalty():
    x, _ = planted(seed=4, N=30)
    shares = []
    for penalty in (0.1, 0.5, 2.0, 6.0):
        model = with_free_codes(x, 12, penalty)
        fit_dictionary(model, x, max_iterations=30)
        shares.append((parts(model)[2] == 0).mean())
    assert all(low < high for low, high in itertools.pairwise(shares))


def test_scaling_codes_against_columns_lowers_the_objective():
    x, _ = planted(seed=5)
    model = with_free_codes(x, 5, 1.0)
    fit = fit_dictionary(model, x, max_iterations=50)
    for factor in (0.1, 0.9, 1.1, 10.0):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.decoder[0].free.div_(factor)
            other.guide.loc.mul_(factor)
        assert elbo(other.model, other.guide, x).mean() < fit.objective[-1] - 1e-3


# Unused atoms


def test_an_unused_atom_is_reset_to_the_largest_residual():
    x, _ = planted(seed=6, width=D - 1)
    x = np.concatenate([x, np.zeros((len(x), 1))], 1)  # zero along the last axis
    model = with_free_codes(x, 3, 0.5)
    with torch.no_grad():
        model.decoder[0].free[:, 0] = torch.eye(D)[-1].double()
        model.decoder[0].free[-1, 1:] = 0.0
        model.decoder[0].bias[-1] = 0.0
    fit = fit_dictionary(model, x, max_iterations=40)
    W, _, Z = parts(model)
    assert abs(W[-1]).max() < 1e-12 and (Z[:, 0] != 0).any()
    assert "an unused atom was reset to the largest residual 1 time" in fit.notes
    assert float(fit.objective.diff().min()) > -1e-12


def test_unused_atoms_are_counted_if_no_residual_is_large_enough():
    x, _ = planted(seed=7)
    centred = np.linalg.norm(x - x.mean(0), axis=1).max()
    model = with_free_codes(x, 4, 1.001 * centred / SIGMA**2)
    before = parts(model)[0]
    fit = fit_dictionary(model.center(x), x)
    W, _, Z = parts(model)
    assert (Z == 0).all() and fit.stopped.startswith("converged")
    np.testing.assert_allclose(W, before, atol=1e-15)
    assert "unused atoms: 4 of 4" in fit.notes
    assert not any("reset" in note for note in fit.notes)
    assert "no bound on log p(x)" in repr(fit)


def test_there_may_be_more_unused_atoms_than_data():
    x, _ = planted(seed=8, N=3)
    model = with_free_codes(x, 12, 0.5)
    fit = fit_dictionary(model, x, max_iterations=30)
    assert float(fit.objective.diff().min()) > -1e-12
    assert np.isfinite(parts(model)[0]).all()


# Arguments


def test_an_encoder_and_the_dtype_are_unchanged():
    x, _ = planted(seed=9)
    model = Autoencoder.linear(
        D, K, columns="unit", prior="laplace", penalty=0.5, likelihood=Gaussian(SIGMA), seed=0
    )
    encoder = copy.deepcopy(model.guide.state_dict())
    fit = fit_dictionary(model, x, max_iterations=20)
    assert all(torch.equal(v, encoder[k]) for k, v in model.guide.state_dict().items())
    assert any("the guide is unchanged" in note for note in fit.notes)
    assert fit.objective.dtype == torch.float64
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    double = with_free_codes(x, K, 0.5)
    with torch.no_grad():
        start = Autoencoder.linear(D, K, columns="unit", seed=0).decoder[0]
        double.decoder[0].free.copy_(start.free)
        double.decoder[0].bias.copy_(start.bias)
    again = fit_dictionary(double, torch.as_tensor(x), max_iterations=20)
    np.testing.assert_allclose(fit.objective, again.objective, rtol=1e-4)
    assert not any("the guide is unchanged" in note for note in again.notes)


def linear(columns="unit", prior="laplace", likelihood=None):
    likelihood = Gaussian(1.0) if likelihood is None else likelihood
    return Autoencoder.linear(D, K, columns=columns, prior=prior, likelihood=likelihood)


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
def test_unsuitable_autoencoders_are_rejected(make, match):
    with pytest.raises(ValueError, match=match):
        fit_dictionary(make(), planted()[0])


def test_invalid_arguments_are_rejected():
    x, _ = planted()
    model = with_free_codes(x, K, 1.0)
    with pytest.raises(ValueError, match="tol must be positive, in nats per datum; got 0"):
        fit_dictionary(model, x, tol=0.0)
    with pytest.raises(ValueError, match="max_iterations must be a whole number >= 1; got 0"):
        fit_dictionary(model, x, max_iterations=0)
    x[0, 0] = np.nan
    with pytest.raises(
        ValueError, match="x has 1 missing entries: with them, columns of length one"
    ):
        fit_dictionary(model, x)
