"""Latent spaces of different dimensions compared, and their plots."""

import dataclasses
import json

import matplotlib.pyplot as plt
import numpy as np
import oracles
import pytest
import torch
import user_pairs
from figures import UNITS, assert_texts_are_readable, texts

from ppl_vae import PPCA, VAE, ExactGuide, fit_closed_form, log_likelihood
from ppl_vae.evaluation.latent_space.latent_spaces import LatentSpaces, latent_spaces
from ppl_vae.evaluation.prediction.predictive import code_width, encode
from ppl_vae.plots import latent_spaces as latent_plots

SIZES = (2, 5, 10, 20)


@pytest.fixture(scope="module")
def table():
    return torch.from_numpy(oracles.simulate_ppca((16, 9, 4, 2, 1.5), 1, 60, 8, seed=0))


@pytest.fixture(scope="module")
def ppcas(table):
    """Exact pairs with two and with four latent dimensions, on principal axes."""
    found = {}
    for latent_dim in (2, 4):
        ppca = PPCA.like(table, latent_dim)
        fit_closed_form(ppca, table)
        ppca = ppca.canonical()
        found[f"K = {latent_dim}"] = ppca.model, ExactGuide(ppca)
    return found


@pytest.fixture(scope="module")
def four():
    """Latent spaces of untrained VAEs, with labels."""
    made = {f"K = {k}": VAE.mlp(6, k, seed=k) for k in SIZES}
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    pairs = {name: (vae.model, vae.guide) for name, vae in made.items()}
    return latent_spaces(pairs, x, labels=np.arange(30) % 10, num_samples=30, refine=0, seed=0)


def test_latent_spaces_of_ppca_agree_with_the_closed_form(ppcas, table):
    found = latent_spaces(ppcas, table, num_samples=30, refine=0, seed=0)
    values, _ = oracles.sample_spectrum(table.numpy())
    for space, (name, (model, guide)) in zip(found.spaces, ppcas.items(), strict=True):
        K = int(name[-1])
        assert (space.name, space.latent_dim, space.leading) == (name, K, (0, 1))
        expected = oracles.posterior_mean_variance(values[:K], values[K:].mean())
        assert space.mean_variances.numpy() == pytest.approx(expected, abs=1e-8)
        assert int(space.active.sum()) == K
        assert torch.equal(space.codes, encode(model, guide, table)[:, :2])
        exact = oracles.closed_form_log_likelihood(values, K)
        assert space.estimate.mean == pytest.approx(exact, abs=1e-8)
        assert space.log_p == f"{exact:.2f} ± {space.estimate.mean_error:.2f} (100 % reliable)"
        assert f"{name}  log p {space.log_p}  {K} of {K} dimensions active" in repr(found)


def test_the_leading_dimensions_are_those_with_the_largest_variance(table):
    ppca = PPCA.like(table, 4)
    fit_closed_form(ppca, table)
    axes = ppca.canonical().loadings.detach()
    turned = ppca.canonical()
    with torch.no_grad():  # the second and fourth axes have the largest variance, the third none
        turned.loadings.copy_(torch.stack([axes[:, 2], axes[:, 0], 0 * axes[:, 3], axes[:, 1]], 1))
    (space,) = latent_spaces(
        {"turned": (turned.model, ExactGuide(turned))}, table, num_samples=30, refine=0, seed=0
    ).spaces
    assert space.leading == (1, 3)
    assert space.active.tolist() == [True, True, False, True]


def test_estimates_equal_those_of_log_likelihood(four):
    vae = VAE.mlp(6, 5, seed=5)
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    expected = log_likelihood(vae.model, vae.guide, x, 30, seed=0)
    assert torch.equal(four.spaces[1].estimate.value, expected.value)


@pytest.mark.parametrize("name", user_pairs.PAIRS)
def test_external_pairs(name):
    model, guide, x = user_pairs.PAIRS[name]()
    if code_width(model, x) == 1:
        with pytest.raises(ValueError, match="mine has one latent dimension; two are needed"):
            latent_spaces({"mine": (model, guide)}, x, num_samples=10, refine=0, seed=0)
        return
    found = latent_spaces({"mine": (model, guide)}, x, num_samples=10, refine=0, seed=0)
    (space,) = found.spaces
    assert space.codes.shape == (len(torch.as_tensor(x)), 2)
    assert space.latent_dim == code_width(model, x) and space.estimate.value.isfinite().all()


def test_bad_arguments(ppcas, table):
    with pytest.raises(ValueError, match="give at least one pair"):
        latent_spaces({}, table)
    with pytest.raises(ValueError, match="labels has 3 entries for 60 rows of data"):
        latent_spaces(ppcas, table, labels=[1, 2, 3])


# The plot


def drawn(spaces):
    figure = latent_plots.plot_latent_spaces(spaces)
    yield figure
    plt.close(figure)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("labelled", [True, False])
def test_the_plot_is_readable(number, labelled, four):
    part = dataclasses.replace(four, spaces=four.spaces[:number])
    part = part if labelled else dataclasses.replace(part, labels=None)
    stored = LatentSpaces.from_dict(json.loads(json.dumps(part.to_dict(), allow_nan=False)))
    for figure in drawn(stored):
        assert_texts_are_readable(figure)
        assert len(figure.axes) == number and len(figure.legends) == labelled
        for ax, space in zip(figure.axes, four.spaces, strict=False):
            assert UNITS.search(ax.get_ylabel().replace("sds", "standard deviations"))
            points = np.concatenate([c.get_offsets() for c in ax.collections])
            assert len(points) == 30
            if not labelled:
                assert np.allclose(points, space.codes.numpy())


def test_the_plot_has_the_estimates_and_dimensions_as_labels(four):
    for figure in drawn(four):
        words = [text for text, _ in texts(figure)]
        for ax, space in zip(figure.axes, four.spaces, strict=True):
            across, below, active = ax.get_xlabel().splitlines()
            assert below == f"log p {space.log_p}, nats per datum"
            assert active == f"{int(space.active.sum())} of {space.latent_dim} dimensions active"
            assert across == f"$z_{{{space.leading[0] + 1}}}$, sds of the prior"
        assert "K = 2" in words and "K = 20: the most used 2 of 20" in words
        assert {str(k) for k in range(10)} <= set(words)


def test_lower_bounds_are_marked(four):
    space = four.spaces[0]
    unsure = dataclasses.replace(
        space.estimate, reliable=torch.zeros_like(space.estimate.reliable)
    )
    text = dataclasses.replace(space, estimate=unsure).log_p
    assert text.startswith("≥") and text.endswith("(0 % reliable)")


def test_one_space_alone_is_drawn_on_ones_own_axes(four):
    figure, ax = plt.subplots(figsize=latent_plots.PANEL_SIZE, layout="constrained")
    assert latent_plots.plot_latent_space(four.spaces[2], four.labels, ax) is ax
    assert_texts_are_readable(figure)
    plt.close(figure)
