"""Denoisers on the same noise: errors and their paired differences against numpy."""

import json
import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import oracles
from draws import draw
from figures import assert_texts_are_readable
from ppl_vae import PPCA, fit_closed_form
from ppl_vae.evaluation import Denoising, compare_denoisers
from ppl_vae.networks import GaussianNoise
from ppl_vae.plots import images as image_plots

N, D = 50, 6


@pytest.fixture(scope="module")
def found():
    return compare_denoisers({"half": lambda x: x / 2, "zero": torch.zeros_like}, draw(N, D),
                             GaussianNoise(0.7), seed=0)  # fmt: skip


def test_errors_agree_with_numpy(found):
    x = draw(N, D).numpy()
    noisy = found.noisy.numpy()
    assert np.abs(noisy - x).std() > 0.3
    expected = {"no denoising": noisy - x, "half": noisy / 2 - x, "zero": -x}
    assert found.names == tuple(expected)
    for place, (name, off) in enumerate(expected.items()):
        error = (off**2).sum(1)
        np.testing.assert_allclose(found.error[place], error)
        mean, se = found.difference(name, "zero")
        paired = error - (x**2).sum(1)
        assert mean == pytest.approx(paired.mean(), abs=1e-12)
        assert se == pytest.approx(paired.std(ddof=1) / np.sqrt(N), abs=1e-12)
    np.testing.assert_allclose(found.to_frame()["half"], found.error[1])
    assert found.best == "half"


def test_the_printed_table_marks_the_smallest_error(found):
    lines = repr(found).splitlines()
    assert lines[0].startswith(
        "50 rows of 6 columns; |x - denoised|^2 per row, in squared units of x"
    )
    assert [line.endswith("<- smallest") for line in lines[1:]] == [False, True, False]
    mean, error = found.difference("zero", "half")
    assert f"{found.error[2].mean():.3f} ± " in lines[3]
    assert lines[3].endswith(f"{mean:+.3f} ± {error:.3f}")


def test_results_are_reproducible_and_can_be_stored(found):
    before = torch.get_rng_state()
    again = compare_denoisers({"half": lambda x: x / 2, "zero": torch.zeros_like}, draw(N, D),
                              GaussianNoise(0.7), seed=0)  # fmt: skip
    assert torch.equal(again.noisy, found.noisy) and torch.equal(torch.get_rng_state(), before)
    stored = Denoising.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False)))
    assert repr(stored) == repr(found)


def test_the_posterior_mean_of_ppca_is_the_wiener_filter():
    """If only noise remains beyond K axes, no linear denoiser has a smaller error."""
    scale, spread = 0.5, torch.tensor([3.0, 2.0, 0.0]).double()
    x = draw(4000, 3) * spread
    noisy = x + scale * draw(4000, 3, seed=1)
    ppca = PPCA.like(noisy, latent_dim=2)
    fit_closed_form(ppca, noisy)
    denoisers = {"PPCA": ppca.reconstruct, "projection": lambda rows: rows * (spread > 0)}
    found = compare_denoisers(denoisers, x, GaussianNoise(scale), seed=0)
    wiener = float((spread**2 * scale**2 / (spread**2 + scale**2)).sum())
    assert found.best == "PPCA"
    truths = (3 * scale**2, wiener, 2 * scale**2)
    for error, expected in zip(found.error.mean(1), truths, strict=True):
        # A sum of squares of Gaussians varies by no more than the square of its mean, twice.
        limit = oracles.z_limit(3) * math.sqrt(2 / 4000) + 0.01  # and PPCA was estimated
        assert float(error) == pytest.approx(expected, rel=limit)


def test_bad_arguments():
    x, noise = draw(N, D), GaussianNoise(1.0)
    for denoisers in ({}, {"no denoising": lambda x: x}):
        with pytest.raises(
            ValueError, match="at least one denoiser, none of them called 'no denois"
        ):
            compare_denoisers(denoisers, x, noise)
    with pytest.raises(ValueError, match="two or more complete rows"):
        compare_denoisers({"mine": lambda x: x}, x[:1], noise)
    with pytest.raises(ValueError, match=r"'mine' must return \(50, 6\); it returned \(50, 5\)"):
        compare_denoisers({"mine": lambda x: x[:, 1:]}, x, noise)
    found = compare_denoisers({"mine": lambda x: x}, x, noise)
    with pytest.raises(KeyError, match="no denoiser is called 'yours'; the names are"):
        found.difference("mine", "yours")


def test_the_image_grid_has_the_rows_and_its_plot_is_readable(found):
    image_grid = found.image_grid([3, 7], (2, 3))
    assert image_grid.row_labels == (
        "clean",
        "noisy",
        "half",
        "zero",
    ) and image_grid.column_labels == (
        "3",
        "7",
    )
    rows = [found.clean, found.noisy, found.noisy / 2, torch.zeros_like(found.clean)]
    torch.testing.assert_close(image_grid.values, torch.stack(rows)[:, [3, 7]])
    for shape in ((2, 3), None):
        axes = image_plots.plot_denoised(found.image_grid(range(8), shape))
        assert_texts_are_readable(axes.figure)
        assert axes.get_title(loc="left") == "Held-out data, denoised"
        assert axes.get_ylabel() == ("denoiser" if shape else "column")
        plt.close(axes.figure)
