"""Unrolled sparse encoders (LISTA) against ISTA and the lasso."""

import numpy as np
import pytest
import torch

import oracles
from dictionaries import SIGMA, K, parts, planted, with_free_codes
from ppl_vae.inference import best_codes
from ppl_vae.networks.sparse_layers import LISTA


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_an_unrolled_encoder_is_initialized_as_ista(steps):
    x, _ = planted()
    model = with_free_codes(x, K, 1.0).center(x)
    W, b, _ = parts(model)
    encoder = LISTA(model.decoder[0], 0.2, steps=steps)
    found = encoder(torch.as_tensor(x)).detach()
    expected = oracles.ista(x, W, b, 0.2, steps)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_array_equal(found == 0, expected == 0)
    assert 0 < (expected == 0).mean() < 1


def test_many_unrolled_steps_solve_the_lasso():
    x, _ = planted()
    model = with_free_codes(x, K, 1.0).center(x)
    encoder = LISTA(model.decoder[0], SIGMA**2, steps=5000)
    best = best_codes(model, x, tolerance=1e-7).codes
    with torch.no_grad():
        np.testing.assert_allclose(encoder(torch.as_tensor(x)), best, atol=1e-5)


def test_every_parameter_of_an_unrolled_encoder_has_a_gradient():
    x, _ = planted()
    model = with_free_codes(x, K, 1.0)
    encoder = LISTA(model.decoder[0], SIGMA**2)
    encoder(torch.as_tensor(x)).square().sum().backward()
    assert {n for n, _ in encoder.named_parameters()} == {
        *("input_map.weight", "input_map.bias", "lateral", "log_threshold")
    }
    assert all(float(p.grad.abs().sum()) > 0 for p in encoder.parameters())
    assert model.decoder[0].free.grad is None
    with pytest.raises(ValueError, match="threshold must be positive, as the lasso's is; got 0"):
        LISTA(model.decoder[0], 0.0)
    with pytest.raises(ValueError, match="steps must be a whole number >= 1; got 0"):
        LISTA(model.decoder[0], 1.0, steps=0)
