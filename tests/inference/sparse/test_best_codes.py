"""MAP codes against the lasso of scikit-learn."""

import numpy as np
import pytest
import torch
from dictionaries import SIGMA, D, K, parts, planted, sklearn_lasso, with_free_codes

from ppl_vae import Autoencoder, Gaussian, digits
from ppl_vae.inference import best_codes


def test_best_codes_of_digits_match_scikit_learn():
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
    expected = sklearn_lasso(x - bias, weight, penalty * sigma**2)
    found = best_codes(model, x, tolerance=1e-4).codes
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_array_equal(found == 0, expected == 0)
    assert 0.3 < float((found == 0).double().mean()) < 0.9


def test_best_codes_with_free_columns_or_missing_values_match_scikit_learn():
    x, _ = planted(seed=10, N=6)
    free = Autoencoder.linear(D, K, prior="laplace", likelihood=Gaussian(SIGMA), seed=0).double()
    with torch.no_grad():
        free.decoder[0].weight.mul_(torch.linspace(0.5, 2.0, K).double())
    W, b = (p.detach().numpy() for p in free.decoder.parameters())
    expected = sklearn_lasso(x - b, W, SIGMA**2)
    np.testing.assert_allclose(best_codes(free, x, tolerance=1e-4).codes, expected, atol=1e-4)
    model = with_free_codes(x, K, 1.0)
    W, b, _ = parts(model)
    x[:, 2] = np.nan
    observed = np.delete(np.arange(D), 2)
    expected = sklearn_lasso((x - b)[:, observed], W[observed], SIGMA**2)
    np.testing.assert_allclose(best_codes(model, x, tolerance=1e-4).codes, expected, atol=1e-4)


def test_best_codes_converge_in_float32():
    x, _ = planted(seed=11, N=20)
    model = with_free_codes(x, K, 10.0, sigma=0.1)
    exact = best_codes(model, x, tolerance=1e-6)
    found = best_codes(model.float(), x)
    assert found.codes.dtype == torch.float32 and bool(found.converged.all())
    np.testing.assert_allclose(found.codes, exact.codes, atol=1e-4)
    assert float(found.log_joint.mean()) == pytest.approx(float(exact.log_joint.mean()), rel=1e-4)
