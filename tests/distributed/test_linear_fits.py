"""EM and the closed form on several processes equal those on one, whatever rows each has."""

import math

import cases
import pytest
import torch

TOLERANCE = 1e-12


def table(rows=101, columns=7, missing=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, 2, generator=generator, dtype=torch.float64)
    w = torch.randn(2, columns, generator=generator, dtype=torch.float64)
    x = z @ w + 0.8 * torch.randn(rows, columns, generator=generator, dtype=torch.float64) + 3.0
    x[torch.rand(rows, columns, generator=generator) < missing] = math.nan
    return x


def close(value, expected):
    torch.testing.assert_close(value, expected, rtol=TOLERANCE, atol=TOLERANCE)


def distribution(state):
    """W W', mu and log sigma: the signs of the columns of W are arbitrary."""
    loadings = state["loadings"]
    return state | {"loadings": loadings @ loadings.mT}


def check(workers, kind, x, cuts=None, **options):
    alone, objective, notes, converged = cases.linear_fit(kind, x, **options)
    found = workers.run(cases.linear_fit_kw, kind, x, cuts, options)
    for state, values, _, ended in found:
        assert all(torch.equal(state[name], found[0][0][name]) for name in state)
        for name, value in distribution(alone).items():
            close(distribution(state)[name], value)
        assert ended == converged
        close(values[-1], objective[-1])
    return notes, found


COMPLETE = [("closed form", "isotropic"), ("EM", "isotropic"), ("EM", "diagonal")]


@pytest.mark.parametrize(("kind", "noise"), COMPLETE)
def test_complete_tables(pair, kind, noise):
    check(pair, kind, table(), noise=noise)


@pytest.mark.parametrize("cuts", [[1], [0], [101], [17]])
def test_any_division_of_the_rows(pair, cuts):
    check(pair, "EM", table(), cuts)
    check(pair, "EM", table(missing=0.2), cuts, max_iterations=8)


@pytest.mark.parametrize("noise", ["isotropic", "diagonal"])
def test_missing_values(pair, noise):
    check(pair, "EM", table(missing=0.2), noise=noise, max_iterations=20)
    check(pair, "variational EM", table(missing=0.2), noise=noise, max_iterations=8)


def test_a_column_that_one_process_never_observes(pair):
    x = table(missing=0.1)
    x[:20, 3] = math.nan
    check(pair, "EM", x, [20], max_iterations=8)
