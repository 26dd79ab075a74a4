"""Encoding and decoding with any pair, interpolations, and grids of codes."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

import oracles
import user_pairs
from draws import draw
from ppl_vae import PPCA, VAE, Bernoulli, ExactGuide
from ppl_vae.evaluation import decode, decode_grid, encode, interpolate, mean_data, reconstruct
from ppl_vae.evaluation.latent_space.traversal import interpolate_codes, normal_quantiles
from ppl_vae.evaluation.prediction.predictive import code_width, latent_means


@pytest.fixture(scope="module")
def table():
    return torch.from_numpy(oracles.simulate_ppca((16, 8, 4), 1, 60, 5, seed=0))


@pytest.fixture(scope="module")
def ppca(table):
    return PPCA.like(table, 3, seed=0)


@pytest.mark.parametrize("name", user_pairs.PAIRS)
def test_decoded_codes_of_external_pairs_are_their_reconstructions(name):
    model, guide, x = user_pairs.PAIRS[name]()
    codes = encode(model, guide, x)
    assert codes.shape == (len(torch.as_tensor(x)), code_width(model, x))
    again = decode(model, codes, x)
    assert torch.allclose(again, reconstruct(model, guide, x), atol=1e-6)
    # Permuted codes are decoded to permuted rows.
    assert torch.allclose(decode(model, codes.flip(0), x), again.flip(0), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "method"),
    list(zip(user_pairs.PAIRS, itertools.cycle(["linear", "spherical"]), strict=False)),
)
def test_interpolations_of_external_pairs_start_and_end_at_reconstructions(name, method):
    model, guide, x = user_pairs.PAIRS[name]()
    rows = torch.as_tensor(x)
    found = interpolate(model, x[:4], x[4:8], guide=guide, num_steps=5, method=method)
    assert found.shape == (4, 5, rows.shape[1]) and found.isfinite().all()
    ends = [decode(model, encode(model, guide, part), x) for part in (x[:4], x[4:8])]
    assert torch.allclose(found[:, 0], ends[0], atol=1e-5)
    assert torch.allclose(found[:, -1], ends[1], atol=1e-5)
    codes = [encode(model, guide, part) for part in (x[:4], x[4:8])]
    again = interpolate(model, *codes, template=x, num_steps=5, method=method)
    assert torch.allclose(found, again, atol=1e-6)


@pytest.mark.parametrize("name", user_pairs.PAIRS)
def test_a_grid_of_codes_of_external_pairs(name):
    model, _, x = user_pairs.PAIRS[name]()
    width = code_width(model, x)
    if width == 1:
        with pytest.raises(
            ValueError, match=r"axes must be two of the 1 dimensions; got \(0, 1\)"
        ):
            decode_grid(model, x)
        return
    values = torch.tensor([0.5, 1.0, 1.5])
    found = decode_grid(model, x, values=values, center=torch.ones(width))
    assert found.shape == (3, 3, torch.as_tensor(x).shape[1])
    expected = decode(model, torch.ones(1, width), x)
    assert torch.allclose(found[1, 1], expected[0], atol=1e-6)


def test_a_linear_model_decodes_to_a_straight_line(ppca, table):
    guide = ExactGuide(ppca)
    found = interpolate(ppca.model, table[:3], table[3:6], guide=guide, num_steps=5)
    ends = ppca.reconstruct(table[:3]).detach(), ppca.reconstruct(table[3:6]).detach()
    for step, share in enumerate((0, 0.25, 0.5, 0.75, 1)):
        assert (found[:, step] - torch.lerp(*ends, share)).abs().max() < 1e-12


def test_a_grid_of_a_linear_model_is_spanned_by_its_loadings(ppca, table):
    center, values = draw(3), torch.tensor([-1.0, 0.0, 2.0]).double()
    found = decode_grid(ppca.model, table, values=values, center=center, axes=(2, 0))
    loadings, loc = ppca.loadings.detach(), ppca.loc.detach()
    for row, vertical in enumerate((2.0, 0.0, -1.0)):
        for column, horizontal in enumerate((-1.0, 0.0, 2.0)):
            z = torch.tensor([vertical, float(center[1]), horizontal]).double()
            assert (found[row, column] - (loadings @ z + loc)).abs().max() < 1e-12
    middle = decode_grid(ppca.model, table)[4, 4]
    assert (middle - loc).abs().max() < 1e-12


def test_normal_quantiles_have_equally_spaced_probabilities():
    values = normal_quantiles(9)
    assert np.allclose(stats.norm.cdf(values.numpy()), np.linspace(0.05, 0.95, 9), atol=1e-7)
    assert float(normal_quantiles(3, 0.5)[-1]) == pytest.approx(stats.norm.ppf(0.75))


def test_spherical_interpolation_follows_a_great_circle():
    a, b = draw(20, 6), draw(20, 6, seed=1)
    a, b = 2 * a / a.norm(dim=1, keepdim=True), 2 * b / b.norm(dim=1, keepdim=True)
    codes = interpolate_codes(a, b, 9, "spherical")
    assert (codes.norm(dim=-1) - 2).abs().max() < 1e-12  # on the sphere
    between = (codes[:, 1:] * codes[:, :-1]).sum(-1) / 4
    assert (between - between[:, :1]).abs().max() < 1e-12  # in equal steps
    whole = torch.arccos((a * b).sum(-1) / 4)
    assert (8 * torch.arccos(between[:, 0]) - whole).abs().max() < 1e-12  # along the shorter arc
    assert (codes[:, 0] - a).abs().max() < 1e-12 and (codes[:, -1] - b).abs().max() < 1e-12
    straight = interpolate_codes(a, b, 9)
    assert (straight[:, 4] - (a + b) / 2).abs().max() < 1e-12
    assert (straight[:, 4].norm(dim=-1) < 2).all()


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-5, 1e-4, 2e-4, 1e-3])
def test_nearly_parallel_ends_are_interpolated_accurately(angle):
    a = torch.tensor([[3.0, 0.0]]).double()
    b = 5 * torch.tensor([[np.cos(angle), np.sin(angle)]]).double()
    codes, straight = interpolate_codes(a, b, 5, "spherical"), interpolate_codes(a, b, 5)
    assert (codes - straight).abs().max() < 5 * angle**2 + 1e-12
    single = interpolate_codes(a.float(), b.float(), 5, "spherical")
    assert single.dtype == torch.float32 and torch.allclose(single.double(), codes, atol=1e-5)


def test_means_stay_in_the_support():
    vae = VAE.mlp(6, 3, hidden=(8,), likelihood=Bernoulli(), seed=0)
    x = (torch.rand(8, 6, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    found = interpolate(vae.model, x[:2], x[2:4], guide=vae.guide, method="spherical")
    assert found.shape == (2, 8, 6) and ((found > 0) & (found < 1)).all()
    assert torch.allclose(found[:, 0], vae.reconstruct(x[:2]))


def test_rows_with_missing_values_have_codes(ppca, table):
    x = torch.from_numpy(oracles.with_missing_values(table.numpy(), 0.3, seed=0))
    codes = encode(ppca.model, ExactGuide(ppca), x)
    assert torch.equal(codes, latent_means(ppca.model, ExactGuide(ppca), x)["z"])
    expected = mean_data(ppca.model, {"z": codes}, x)
    assert torch.allclose(decode(ppca.model, codes, x), expected)


def test_bad_arguments(ppca, table):
    guide, codes = ExactGuide(ppca), draw(2, 3)
    for both in ({}, {"guide": guide, "template": table}):
        with pytest.raises(
            ValueError, match="give guide= if start and end are data, or template="
        ):
            interpolate(ppca.model, table[:2], table[2:4], **both)
    with pytest.raises(
        ValueError, match="method must be one of 'linear', 'spherical'; got 'round'"
    ):
        interpolate_codes(codes, codes, 3, "round")
    with pytest.raises(
        ValueError, match=r"must have the same shape; they have \(2, 3\) and \(1, 3\)"
    ):
        interpolate_codes(codes, codes[:1], 3)
    with pytest.raises(ValueError, match="num_steps must be a whole number >= 2; got 1"):
        interpolate_codes(codes, codes, 1)
    with pytest.raises(ValueError, match="codes are opposite, so the great circle between them"):
        interpolate_codes(codes, -2 * codes, 3, "spherical")
    with pytest.raises(ValueError, match="a code is zero and has no direction"):
        interpolate_codes(codes, 0 * codes, 3, "spherical")
    with pytest.raises(ValueError, match=r"codes have 2 columns; the latent sites have {'z': 3}"):
        decode(ppca.model, codes[:, :2], table)
    for axes in ((0, 0), (0, 3), (-1, 0)):
        with pytest.raises(ValueError, match="axes must be two of the 3 dimensions"):
            decode_grid(ppca.model, table, axes=axes)
