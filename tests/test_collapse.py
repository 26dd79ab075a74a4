"""KL a latent dimension, and the axes that should collapse."""

import math

import numpy as np
import pytest
import torch

import foreign
import oracles
from ppl_vae import PPCA, VAE, AmortizedGuide, ExactGuide, digits, fit_closed_form, mlp
from ppl_vae.evaluation.collapse import kl_by_dimension, spectrum
from ppl_vae.objectives import ELBO


def test_at_the_optimum_of_ppca_each_axis_carries_half_log_of_its_ratio():
    x = oracles.simulate_ppca((16, 8, 4), 1, 300, 7, seed=0)
    ppca = PPCA.like(x, 3, seed=0)
    fit_closed_form(ppca, x)
    turned = ppca.canonical()
    guide = ExactGuide(turned, covariance="diagonal")
    values, _ = oracles.sample_spectrum(x)
    noise = values[3:].mean()
    expected = 0.5 * np.log(values[:3] / noise)
    assert kl_by_dimension(turned.model, guide, x).numpy() == pytest.approx(expected, abs=1e-7)


def test_it_adds_up_to_the_kl_of_the_bound_and_does_not_depend_on_blocks():
    vae = VAE.mlp(6, 3, hidden=(8,), seed=0)
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    kl = kl_by_dimension(vae.model, vae.guide, x)
    whole = ELBO().terms(vae.model, vae.guide, x)[1].mean()
    assert float(kl.sum()) == pytest.approx(float(whole.detach()), rel=1e-5)
    parts = kl_by_dimension(vae.model, vae.guide, x, batch_size=7)
    assert parts.numpy() == pytest.approx(kl.numpy(), rel=1e-5)


def test_the_prior_as_guide_uses_nothing():
    ppca = PPCA(5, 2, seed=0)
    encoder = torch.nn.Linear(5, 2)
    torch.nn.init.zeros_(encoder.weight), torch.nn.init.zeros_(encoder.bias)
    guide = AmortizedGuide(encoder, 2, covariance="unit")
    assert kl_by_dimension(ppca.model, guide, torch.randn(9, 5)).abs().max() == 0


def test_a_full_covariance_is_no_sum_over_dimensions():
    ppca = PPCA(5, 2, seed=0)
    guide = AmortizedGuide(mlp(5, 5, seed=0), 2, covariance="full")
    with pytest.raises(ValueError, match="KL a dimension; site 'z' has a MultivariateNormal"):
        kl_by_dimension(ppca.model, guide, torch.randn(9, 5))


@pytest.mark.parametrize("name", foreign.PAIRS)
def test_strangers_pairs(name):
    model, guide, x = foreign.PAIRS[name]()
    kl = kl_by_dimension(model, guide, x, seed=0)
    assert kl.dim() == 1 and kl.isfinite().all()


def test_the_spectrum_of_the_digits_and_the_axes_that_are_off_at_unit_noise():
    found = spectrum(digits(), 10, {"unit": 1.0, "small": 1e-3})
    values, _ = oracles.sample_spectrum(digits())
    assert found.eigenvalues.numpy() == pytest.approx(values, abs=1e-10)
    assert float(found.eigenvalues[0]) == pytest.approx(0.699, abs=5e-4)
    assert found.collapsing(1.0) == list(range(10)) and found.collapsing(1e-3) == []
    assert found.collapsing(float(found.eigenvalues[4])) == [4, 5, 6, 7, 8, 9]


def test_the_threshold_is_that_of_ppca():
    # For a given noise the best column of an axis is zero if and only if l_i <= s2.
    x = oracles.simulate_ppca((16, 8, 4), 1, 300, 7, seed=0)
    found = spectrum(x, 3, {})
    for noise in (0.5, 5.0, 12.0, 40.0):
        lengths = (found.eigenvalues[:3] - noise).clamp(min=0).sqrt()
        off = (lengths == 0).nonzero().flatten().tolist()
        assert found.collapsing(noise) == off
        best = oracles_log_p(found.eigenvalues.numpy(), lengths.numpy(), noise)
        for axis in range(3):
            longer = lengths.clone()
            longer[axis] = math.sqrt(float(lengths[axis]) ** 2 + 0.01)
            assert oracles_log_p(found.eigenvalues.numpy(), longer.numpy(), noise) < best


def oracles_log_p(eigenvalues, lengths, noise):
    variances = np.full(len(eigenvalues), noise)
    variances[: len(lengths)] += lengths**2
    return -0.5 * np.sum(np.log(2 * np.pi * variances) + eigenvalues / variances)


def test_wider_than_long():
    x = oracles.simulate_ppca((16, 8), 1, 30, 9, seed=0)[:5]
    found = spectrum(x, 2, {})
    assert len(found.eigenvalues) == 9 and (found.eigenvalues[5:] == 0).all()
    with pytest.raises(ValueError, match="latent_dim"):
        spectrum(x, 0, {})
