"""Random small tables through fit, score and impute, against a dense oracle in many digits."""

import re

import mpmath
import numpy as np
import pandas as pd
import pytest
from random_tables import random_table
from typer.testing import CliRunner

import combinations
from ppl_vae.cli.main import app
from ppl_vae.fitted.folder import load_fitted

EPS = np.finfo(float).eps
NAMED = re.compile(
    r"--[a-z-]+|latent_dim|\bcolumns? |\bcolumn\(s\)|\brows?\b|\bline \d|column names|give header"
)
"""What an error names: an option, an argument, columns, rows or lines."""
SINGULAR = 454
"""A table whose columns have one or two observed values, so that normal equations are singular."""
DIGITS = 60
LARGEST_CONDITION = 1e30
"""Above it rounding exceeds every other error, and the fit says so."""


def run(*arguments):
    """Standard output of a command, or None after an error that names what is wrong."""
    found = CliRunner().invoke(app, [*map(str, arguments)])
    if found.exit_code == 0:
        return found
    error = found.exception
    assert isinstance(error, ValueError | TypeError), repr(error)
    text = str(error)
    assert NAMED.search(text) and "onverge" not in text and "\n" not in text, text
    return None


class Dense:
    """A Gaussian with the mean and the covariance of a PPCA, in many digits."""

    def __init__(self, fitted):
        ppca = fitted.program
        loadings, loc, scale = (
            mpmath.matrix(p.detach().double().numpy().tolist())
            for p in (ppca.loadings, ppca.loc, ppca.noise_scale.expand(ppca.data_dim))
        )
        self.mean, self.covariance = loc, loadings * loadings.T
        for d in range(ppca.data_dim):
            self.covariance[d, d] += scale[d] ** 2

    def parts(self, known):
        """The numbers of the observed and of the missing entries, the precision and det."""
        size = range(len(self.mean))
        given, gone = [d for d in size if known[d]], [d for d in size if not known[d]]
        block = mpmath.matrix(len(given))
        for i, a in enumerate(given):
            for j, b in enumerate(given):
                block[i, j] = self.covariance[a, b]
        return given, gone, block**-1 if given else None, mpmath.det(block) if given else None

    def difference(self, row, given):
        return mpmath.matrix([mpmath.mpf(row[d]) - self.mean[d] for d in given])

    def log_density(self, row, parts):
        """log p of the observed entries, and their squared Mahalanobis distance."""
        given, _, precision, det = parts
        difference = self.difference(row, given)
        distance = (difference.T * precision * difference)[0]
        constant = len(given) * mpmath.log(2 * mpmath.pi) + mpmath.log(det)
        return float(-(constant + distance) / 2), float(distance)

    def conditional(self, row, parts):
        """Means and variances of the missing entries given the observed ones."""
        given, gone, precision, _ = parts
        found = {}
        for g in gone:
            mean, variance = self.mean[g], self.covariance[g, g]
            if given:
                difference = self.difference(row, given)
                cross = mpmath.matrix([self.covariance[g, d] for d in given])
                mean += (cross.T * precision * difference)[0]
                variance -= (cross.T * precision * cross)[0]
            found[g] = float(mean), float(variance)
        return found

    def condition(self):
        """The condition number of the covariance; infinite if it exceeds the number of digits."""
        try:
            return float(mpmath.cond(self.covariance))
        except ZeroDivisionError:
            return np.inf


def by_pattern(dense, values):
    """Each row with the parts of the covariance for its pattern."""
    found = {}
    for row, known in zip(values, ~np.isnan(values), strict=True):
        key = known.tobytes()
        if key not in found:
            found[key] = dense.parts(known)
        yield row, known, found[key]


def check_scores(fitted, dense, values, scores):
    units, tolerance = fitted.units, 10 * len(fitted.columns) ** 2 * EPS * dense.condition()
    x = units.apply(fitted_rows(values)).numpy()
    scale = np.broadcast_to(units.scale.numpy(), x.shape[1:])
    for (row, known, parts), value in zip(by_pattern(dense, x), scores, strict=True):
        if not known.any():
            assert np.isnan(value)
            continue
        expected, distance = dense.log_density(row, parts)
        expected -= np.log(scale[known]).sum()
        size = 1e-12 * (1 + abs(expected))
        assert value == pytest.approx(expected, abs=size + tolerance * (1 + distance), rel=0)


def check_imputed(fitted, dense, values, filled):
    units, condition = fitted.units, dense.condition()
    x = units.apply(fitted_rows(values)).numpy()
    loc, scale = units.loc.numpy(), np.broadcast_to(units.scale.numpy(), x.shape[1:])
    found = filled[list(fitted.columns)].to_numpy()
    np.testing.assert_array_equal(found[~np.isnan(values)], values[~np.isnan(values)])
    for n, (row, _, parts) in enumerate(by_pattern(dense, x)):
        for d, (mean, variance) in dense.conditional(row, parts).items():
            mean, sd = mean * scale[d] + loc[d], variance**0.5 * scale[d]
            rounding = 1e-5 * abs(mean) + 100 * EPS * condition * (sd + abs(mean - loc[d]))
            assert found[n, d] == pytest.approx(mean, abs=rounding, rel=0)
            shown = filled[f"{fitted.columns[d]} sd"][n]
            if not np.isnan(shown):
                close = 1e-5 * sd + 100 * EPS * condition * scale[d]
                assert shown == pytest.approx(sd, abs=close, rel=0)


def fitted_rows(values):
    import torch

    return torch.from_numpy(values.copy())


def check(seed, folder):
    """Fit, score and impute the table of a seed; whether it could be fitted."""
    table = random_table(seed, folder)
    model = folder / "m"
    if run("fit", table.path, "--out", model, *table.options) is None:
        assert not (model / "fit.json").exists()
        return False
    fitted = load_fitted(model)
    with mpmath.workdps(DIGITS):
        dense = Dense(fitted)
        if dense.condition() > LARGEST_CONDITION:
            assert "too ill-conditioned for float64" in " ".join(fitted.metadata.notes)
            return True
        scores, filled = folder / "s.csv", folder / "f.csv"
        assert run("score", model, table.path, "--out", scores)
        assert run("impute", model, table.path, "--out", filled)
        values = numbers(table, fitted)
        check_scores(fitted, dense, values, pd.read_csv(scores)["log_p"])
        check_imputed(fitted, dense, values, pd.read_csv(filled))
    return True


def numbers(table, fitted):
    """The modelled columns of a table."""
    frame = table.frame
    if table.path.suffix == ".npy":
        return frame.to_numpy(dtype=float)
    found = frame[list(fitted.columns)]
    if table.path.suffix != ".parquet":  # single precision is written in few digits
        single = found.select_dtypes("float32")
        found = found.assign(**{name: single[name].astype(str) for name in single})
    return found.astype(float).to_numpy()


@pytest.mark.parametrize("seed", [SINGULAR, *combinations.one_in(2, range(24))])
def test_a_random_table(seed, tmp_path):
    check(seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [seed for seed in range(24, 500) if seed != SINGULAR])
def test_many_random_tables(seed, tmp_path):
    check(seed, tmp_path)
