"""Triangular factors of X'X, with and without a QR decomposition."""

import numpy as np
import pytest
import torch

from ppl_vae.models.linear.eigen import triangular_factor


@pytest.mark.parametrize("num_rows", [3, 7, 113, 224, 229, 1500])
def test_a_triangular_factor_of_any_number_of_rows_keeps_small_singular_values(num_rows):
    # Singular values from 1 to 1e-10, which X'X would lose: they are known from the construction.
    generator = np.random.default_rng(num_rows)
    size = min(num_rows, 7)
    singular = np.logspace(0, -10, size)
    left = np.linalg.qr(generator.normal(size=(num_rows, size)))[0]
    right = np.linalg.qr(generator.normal(size=(7, size)))[0]
    factor = triangular_factor(torch.from_numpy(left * singular @ right.T))
    assert factor.shape == (size, 7) and torch.equal(factor, factor.triu())
    found = np.linalg.svd(factor.numpy(), compute_uv=False)
    assert found == pytest.approx(singular, abs=1e-15)


@pytest.mark.parametrize(
    ("smallest", "decomposed"), [(0.3, False), (0.15, False), (0.09, True), (1e-8, True)]
)
def test_a_triangular_factor_is_precise_on_both_sides_of_the_criterion(smallest, decomposed):
    """X = U (V diag(s) V') with columns of unit length has correlations V diag(s^2) V'."""
    rng = np.random.default_rng(0)
    left = np.linalg.qr(rng.normal(size=(4000, 4)))[0]
    # A Hadamard matrix, so that every column of V diag(s) V' has the same length.
    right = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    singular = np.array([1.2, 1.0, 1.0, smallest])
    singular[:3] *= ((4 - smallest**2) / (singular[:3] ** 2).sum()) ** 0.5
    rows = torch.from_numpy(left @ (right * singular) @ right.T)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        factor = triangular_factor(rows)
    assert decomposed == any("linalg_qr" in event.key for event in profile.key_averages())
    found = np.linalg.svd(factor.numpy(), compute_uv=False)
    # Forming the product left @ ... rounds X itself, by eps relative to its largest column.
    np.testing.assert_allclose(found, np.sort(singular)[::-1], rtol=1e-14, atol=2e-15)
    np.testing.assert_allclose(factor.T @ factor, rows.T @ rows, atol=1e-14)


@pytest.mark.parametrize("scale", [1e-140, 1e140])
def test_a_triangular_factor_of_columns_whose_squares_leave_the_range(scale):
    rows = torch.from_numpy(np.random.default_rng(0).normal(size=(500, 3)))
    factor = triangular_factor(rows * torch.tensor([1.0, scale, 1.0], dtype=torch.float64))
    expected = np.linalg.qr(rows.numpy(), mode="r") * [1.0, scale, 1.0]
    sign = np.sign(np.diag(expected))[:, None] * np.sign(np.diag(factor))[:, None]
    np.testing.assert_allclose(factor, sign * expected, rtol=1e-12)
