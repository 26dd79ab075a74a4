"""Evaluations whose rows several processes share."""

import math

import evaluation_cases as cases
import pytest
import torch
from tables import close, table


@pytest.mark.parametrize("kind", ["log_likelihood", "elbo", "gaps"])
@pytest.mark.parametrize("rows", [1, 31])
def test_exact_values_are_gathered_in_order(two, kind, rows):
    x = table(31, missing=0.1)[:rows]
    for value in two.run(cases.exact, kind, x):
        close(value, cases.exact(kind, x))


def test_imputations_are_gathered_in_order(two):
    x = table(31, missing=0.1)
    first, second = two.run(cases.exact, "impute", x)
    assert torch.equal(first, second)
    # Means of 10,000 draws of E[x | z], whose standard deviation is that of W z, about one.
    torch.testing.assert_close(first, cases.exact("impute", x), rtol=0, atol=0.06)


def test_rows_in_the_given_order(two):
    for value in two.run(cases.rows_of, table(31)):
        close(value, cases.rows_of(table(31)))


def test_random_draws(two):
    x = table(31, missing=0.1)
    first, second = two.run(cases.sampled, x)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    # Under the posterior the ELBO is log p; the mean of 31 x 200 draws of log p(x | z), whose
    # standard deviation is below 3 nats, has an error below 0.04.
    exact = cases.exact("log_likelihood", x).mean()
    assert abs(float(first[0].mean() - exact)) < 0.16


def test_draws_without_a_seed(two):
    first, second = two.run(cases.unseeded, table(31))
    assert torch.equal(first, second)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_works_alone(two, rank):
    x = table(31)
    found = two.run(cases.alone_on_rank, rank, x)
    assert found[1 - rank] is None
    close(found[rank], cases.exact("log_likelihood", x))


def test_imputation_from_a_posterior_is_shared(two):
    x = table(31, missing=0.1)
    alone, found = cases.moments_from_posterior(x), two.run(cases.moments_from_posterior, x)
    for first, second, expected in zip(*found, alone, strict=True):
        assert torch.equal(first, second)
        if expected is not alone[-1]:  # joint draws
            close(first, expected)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [3, 31])
def test_four_processes(four, rows):
    x = table(rows, missing=0.1)
    x[:-1, 3] = math.nan  # observed on one process
    for kind in ("log_likelihood", "elbo", "gaps"):
        for value in four.run(cases.exact, kind, x):
            close(value, cases.exact(kind, x))
    alone = cases.moments_from_posterior(x)
    for found in four.run(cases.moments_from_posterior, x):
        for value, expected in zip(found[:3], alone[:3], strict=True):
            close(value, expected)


SHARED = ("log_likelihood", "elbo", "gaps", "impute", "impute from a posterior")
FITS = ("fit_vb", "sample_posterior")
X = table(31, missing=0.1)
OTHERS = {
    **{
        f"data of {kind}": (kind, {"shift": 0.0}, {"shift": 1.0}, "x is 31 x 7") for kind in SHARED
    },
    **{f"seed of {kind}": (kind, {"seed": 1}, {"seed": 2}, "seed is 2 on") for kind in SHARED},
    **{f"seed of {kind}": (kind, {"seed": 1}, {"seed": 2}, "seed is 2 on") for kind in FITS},
    **{
        f"a bad number of draws of {kind}": (kind, {}, {"num_samples": 0}, "num_samples must be")
        for kind in (*SHARED, "sample_posterior")
    },
    "draws": ("log_likelihood", {}, {"num_samples": 6}, "settings is num_samples=6, "),
    "draws of an ELBO": ("elbo", {}, {"num_samples": 6}, "settings is num_samples=6, "),
    "steps": ("gaps", {}, {"steps": 3}, "steps=3"),
    "refinement": ("impute", {}, {"refine": 3}, "refine=3"),
    "number of imputations": ("impute from a posterior", {}, {"draws": 2}, "draws=2"),
    "posterior": ("impute from a posterior", {}, {"scale": 2.0}, "posterior is"),
    "parameters": ("elbo", {}, {"parameter_seed": 1}, "elbo: parameters is of checksum"),
    "a bad batch size": ("elbo", {}, {"batch_size": 0}, "batch_size must be"),
    "a bad capture": ("log_likelihood", {}, {"capture": "x"}, "capture must be"),
    "a bad precision": ("log_likelihood", {}, {"precision": "x"}, "precision"),
    "a bad tolerance": ("gaps", {}, {"tolerance": 0}, "tolerance must be positive"),
    "a bad method": ("log_likelihood", {}, {"method": "x"}, "method must be"),
    "a bad covariance": ("impute", {}, {"refine": 1, "covariance": "x"}, "covariance must be"),
    "a bad quantile": ("impute", {}, {"quantiles": [0.5]}, "need the draws of a posterior"),
    "iterations": ("fit_vb", {}, {"max_iterations": 3}, "max_iterations is 3 on rank 1"),
    "a bad tol": ("fit_vb", {}, {"tol": -1.0}, "tol"),
    "chains": ("sample_posterior", {}, {"chains": 3}, "chains is 3"),
    "a bad sampler": ("sample_posterior", {}, {"sampler": "x"}, "sampler must be"),
    "NUTS on one": ("sample_posterior", {}, {"sampler": "nuts"}, "sampler is nuts on"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_differs_is_named_on_every_process(two, name):
    kind, first, second, message = OTHERS[name]
    for text in two.errors(cases.call_kw, kind, X, each=[(first,), (second,)]):
        assert message in text


def test_missing_values_on_one_process(two):
    """A process whose table is complete imputes nothing, and must not leave the others alone."""
    for kind in ("impute", "impute from a posterior"):
        each = [(table(31), {}), (X, {})]
        for text in two.errors(cases.call_kw, kind, each=each):
            assert "x is 31 x 7" in text or "mask is" in text


def test_a_mistake_of_the_user(two):
    for text in two.errors(cases.failing, table(31)):
        assert "ZeroDivisionError: a mistake of the user" in text


def test_blocks_of_other_rows_are_found(two, tmp_path):
    """Rows that each process reads from a file of its own are compared."""
    for name, shift in (("first", 0.0), ("second", 1.0)):
        (table(31) + shift).numpy().tofile(tmp_path / name)
    each = [(str(tmp_path / name),) for name in ("first", "second")]
    for text in two.errors(cases.elbo_of_file, each=each):
        assert "elbo: x is 31 x 7" in text
