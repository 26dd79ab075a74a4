"""Evaluations whose rows several processes share."""

import evaluation_cases as cases
import pytest
import torch
from test_linear_fits import close, table


@pytest.mark.parametrize("kind", ["log_likelihood", "elbo", "gaps"])
@pytest.mark.parametrize("rows", [1, 31])
def test_exact_values_are_gathered_in_order(pair, kind, rows):
    x = table(31, missing=0.1)[:rows]
    for value in pair.run(cases.exact, kind, x):
        close(value, cases.exact(kind, x))


def test_imputations_are_gathered_in_order(pair):
    x = table(31, missing=0.1)
    first, second = pair.run(cases.exact, "impute", x)
    assert torch.equal(first, second)
    # Means of 10,000 draws of E[x | z], whose standard deviation is that of W z, about one.
    torch.testing.assert_close(first, cases.exact("impute", x), rtol=0, atol=0.06)


def test_rows_in_the_given_order(pair):
    for value in pair.run(cases.rows_of, table(31)):
        close(value, cases.rows_of(table(31)))


def test_random_draws(pair):
    x = table(31, missing=0.1)
    first, second = pair.run(cases.sampled, x)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    # Under the posterior the ELBO is log p; the mean of 31 x 200 draws of log p(x | z), whose
    # standard deviation is below 3 nats, has an error below 0.04.
    exact = cases.exact("log_likelihood", x).mean()
    assert abs(float(first[0].mean() - exact)) < 0.16


def test_draws_without_a_seed(pair):
    first, second = pair.run(cases.unseeded, table(31))
    assert torch.equal(first, second)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_works_alone(pair, rank):
    x = table(31)
    found = pair.run(cases.alone_on_rank, rank, x)
    assert found[1 - rank] is None
    close(found[rank], cases.exact("log_likelihood", x))


OTHERS = {
    "data": (cases.with_other, (0.0, 5), (1.0, 5), "log_likelihood: x is 31 x 7"),
    "draws": (cases.with_other, (0.0, 5), (0.0, 6), "settings is num_samples=6, "),
    "parameters": (cases.with_other_parameters, (0,), (1,), "elbo: parameters is of checksum"),
    "a mistake": (cases.failing, (), (), "ZeroDivisionError: a mistake of the user"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_differs_is_named_on_every_process(pair, name):
    function, first, second, message = OTHERS[name]
    for text in pair.errors(function, table(31), each=[first, second]):
        assert message in text
