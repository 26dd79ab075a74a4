"""EM and the closed form on several processes equal those on one, whatever rows each has."""

import math

import cases
import pytest
import torch
from tables import close, table


def distribution(state):
    """W W', mu and log sigma: the signs of the columns of W are arbitrary.

    W is divided by its largest entry, whose square may overflow.
    """
    largest = state["loadings"].abs().max()
    loadings = state["loadings"] / largest
    return state | {"loadings": loadings @ loadings.mT, "largest": largest}


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
def test_complete_tables(two, kind, noise):
    check(two, kind, table(), noise=noise)


@pytest.mark.parametrize("cuts", [[1], [0], [101], [17]])
def test_any_division_of_the_rows(two, cuts):
    check(two, "EM", table(), cuts)
    check(two, "EM", table(missing=0.2), cuts, max_iterations=8)


@pytest.mark.parametrize("noise", ["isotropic", "diagonal"])
def test_missing_values(two, noise):
    check(two, "EM", table(missing=0.2), noise=noise, max_iterations=20)
    check(two, "variational EM", table(missing=0.2), noise=noise, max_iterations=8)


def test_a_column_that_one_process_never_observes(two):
    x = table(missing=0.1)
    x[:20, 3] = math.nan
    check(two, "EM", x, [20], max_iterations=8)


def test_a_scatter_matrix_is_summed(two):
    check_sums = cases.small_products_only(table())[0]
    for state, *_ in two.run(cases.small_products_only, table()):
        close(distribution(state)["loadings"], distribution(check_sums)["loadings"])


def test_more_columns_than_rows(two):
    x = table(rows=9, columns=30)
    check(two, "closed form", x)
    check(two, "EM", x, [9], max_iterations=5)


def test_tables_with_enormous_entries_on_one_process(two):
    x = table()
    x[50:] *= 1e200
    check(two, "closed form", x, [50])


@pytest.mark.parametrize("missing", [0.0, 0.2])
def test_variational_bayes_and_gibbs_sampling(two, missing):
    x = table(missing=missing)
    _, objective, loadings, draws, _ = cases.bayesian(x)
    found = two.run(cases.bayesian, x, [30])
    for _, values, means, same_draws, _ in found:
        close(values, objective)
        close(means.abs(), loadings.abs())
        assert all(torch.equal(same_draws[k], found[0][3][k]) for k in draws)
        # Gibbs sampling amplifies rounding, and QR decompositions fix no signs.
        loc, expected = same_draws["loc"][:, 0], draws["loc"][:, 0]
        torch.testing.assert_close(loc, expected, rtol=0.5, atol=0.5)


def test_draws_without_a_seed_are_the_same_on_all_processes(two):
    first, second = two.run(cases.unseeded_draws, table())
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_messages_do_not_depend_on_the_number_of_rows(two):
    options = {"max_iterations": 3, "tol": 1e-300}
    (few, _), (many, _) = (
        two.run(cases.messages_of, "EM", table(rows, missing=0.2), options) for rows in (40, 160)
    )
    assert few == many
    k, d = 2, 7
    pairs = k * (k + 1) // 2
    statistics = d * (2 * pairs + k + 1) + 2 * pairs + k + 1 + d * (k + 1) + d + 3 + 3 * k * k
    assert few["sum", 8 * statistics] >= 4
    alone = cases.messages_of("EM", table(40, missing=0.2), options)
    assert few["sum", 8 * statistics] == alone["sum", 8 * statistics]


OTHERS = {
    "other arguments": (
        ("EM", table(40), {"tol": 1e-3}),
        ("EM", table(40), {"tol": 1e-4}),
        "fit_em: tol is 0.0001 on rank 1 and 0.001 on rank 0",
    ),
    "another function": (
        ("EM", table(40), {}),
        ("closed form", table(40), {}),
        "rank 1 calls fit_closed_form where rank 0 calls fit_em",
    ),
    "another dtype": (
        ("EM", table(40), {}),
        ("EM", table(40).float(), {}),
        "x: dtype is torch.float32 on rank 1 and torch.float64 on rank 0",
    ),
    "another width": (
        ("EM", table(40), {}),
        ("EM", table(40)[:, :6], {}),
        "x: columns is 6 on rank 1 and 7 on rank 0",
    ),
    "a bad argument": (
        ("EM", table(40), {}),
        ("EM", table(40), {"starts": 0}),
        "starts must be a whole number >= 1",
    ),
    "rows that cannot be read": (
        ("EM", table(40), {}),
        ("EM", table(40).where(table(40) < 5, math.inf), {}),
        "infinite entries",
    ),
    "missing values on one": (
        ("closed form", table(40), {}),
        ("closed form", table(40, missing=0.1), {}),
        "missing entries, and this needs complete data",
    ),
    "no rows at all": (
        ("EM", table(40)[:0], {}),
        ("EM", table(40)[:0], {}),
        "x has no observed value in any row of any process",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_differs_is_named_on_every_process(two, name):
    *each, message = OTHERS[name]
    for text in two.errors(cases.fit_of_rank, each=[(one,) for one in each]):
        assert message in text


@pytest.mark.slow
@pytest.mark.parametrize("rows", [3, 41, 102])
def test_four_processes(four, rows):
    for missing in (0.0, 0.2):
        x = table(rows + 5, missing=missing)
        cuts = [rows // 3, rows // 3, rows // 2]
        check(four, "EM", x, None, max_iterations=8)
        check(four, "EM", x, cuts, max_iterations=8)
