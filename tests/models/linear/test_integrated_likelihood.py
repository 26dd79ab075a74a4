"""The integrated likelihood of PPCA and factor analysis, from the statistics of a table."""

import numpy as np
import pytest
import torch

import oracles
from ppl_vae.data.sources.row_blocks import RowBlocks
from ppl_vae.models.linear.integrated_likelihood import (
    integrated_log_likelihood,
    row_log_likelihood,
)
from ppl_vae.models.linear.table_statistics import TableStatistics

# More rows than columns, as many, fewer; many rows per missingness pattern, and one.
SHAPES = [(50, 4, 2, 0.0), (5, 4, 2, 0.0), (4, 7, 2, 0.0), (60, 3, 1, 0.3), (9, 6, 3, 0.5)]


def table(num_data, data_dim, missing, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_data, data_dim)) @ rng.normal(size=(data_dim, data_dim)) + 3
    return oracles.with_missing_values(x, missing, seed) if missing else x


def parameters(data_dim, latent_dim, noise, shape=(3, 2)):
    generator = torch.Generator().manual_seed(1)

    def draw(*size):
        return torch.randn(*shape, *size, dtype=torch.float64, generator=generator)

    noise_size = () if noise == "isotropic" else (data_dim,)
    return draw(data_dim, latent_dim), draw(data_dim) + 3, draw(*noise_size).exp()


@pytest.mark.parametrize("noise", ["isotropic", "diagonal"])
@pytest.mark.parametrize(("num_data", "data_dim", "latent_dim", "missing"), SHAPES)
def test_it_is_the_density_of_the_rows(num_data, data_dim, latent_dim, missing, noise):
    x = table(num_data, data_dim, missing)
    loadings, loc, scale = parameters(data_dim, latent_dim, noise)
    value = integrated_log_likelihood(TableStatistics.of(x), loadings, loc, scale)
    expected = [
        [
            oracles.log_density(
                x, loc[i, j].numpy(), loadings[i, j].numpy(), scale[i, j].numpy() ** 2
            ).sum()
            for j in range(2)
        ]
        for i in range(3)
    ]
    assert value.shape == (3, 2)
    torch.testing.assert_close(value, torch.tensor(expected), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_gradients(missing):
    statistics = TableStatistics.of(table(8, 3, missing))
    inputs = [part.requires_grad_() for part in parameters(3, 2, "diagonal", shape=(2,))]
    assert torch.autograd.gradcheck(
        lambda *draw: integrated_log_likelihood(statistics, *draw), inputs
    )


@pytest.mark.parametrize("missing", [0.0, 0.2])
def test_blocks_of_rows_give_the_statistics_of_the_table(missing):
    x = table(40, 3, missing)
    draws = parameters(3, 2, "isotropic")
    whole = integrated_log_likelihood(TableStatistics.of(x), *draws)
    blocks = [x[:7], x[7:11], x[11:]]
    parts = integrated_log_likelihood(TableStatistics.of(blocks), *draws)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-10)


def test_it_stays_accurate_where_the_noise_is_small():
    rng = np.random.default_rng(0)
    loadings = rng.normal(size=(4, 2))
    x = rng.normal(size=(30, 2)) @ loadings.T + 1e-6 * rng.normal(size=(30, 4))
    value = integrated_log_likelihood(
        TableStatistics.of(x),
        torch.from_numpy(loadings),
        torch.zeros(4, dtype=torch.float64),
        torch.tensor(1e-6, dtype=torch.float64),
    )
    # On an orthonormal basis of the span of W and its complement the density is a product.
    axes, values, _ = np.linalg.svd(loadings)
    variances = np.r_[values**2, 0, 0] + 1e-12
    scores = x @ axes
    expected = -0.5 * (scores**2 / variances + np.log(2 * np.pi * variances)).sum()
    # x has been rounded: relative to the noise by 1e-16 / 1e-6 per entry.
    assert abs(float(value) - expected) < 1e-6


def test_statistics_of_complete_and_of_incomplete_data():
    x = table(50, 4, 0.0)
    statistics = TableStatistics.of(x)
    centred = torch.from_numpy(x - x.mean(0))
    torch.testing.assert_close(statistics.scatter, centred.mT @ centred)
    assert statistics.rows.shape == (5, 4) and statistics.num_data == 50
    incomplete = TableStatistics.of(table(50, 4, 0.3))
    assert float(incomplete.counts.sum()) == 50
    with pytest.raises(ValueError, match=r"x has \d+ missing entries, and a scatter matrix needs"):
        _ = incomplete.scatter


@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_rows_have_their_own_densities(missing):
    x = table(12, 3, missing)
    loadings, loc, scale = parameters(3, 2, "isotropic", shape=(4,))
    (block,) = RowBlocks(torch.from_numpy(x)).read()
    value = row_log_likelihood(block, loadings, loc, scale)
    expected = [
        oracles.log_density(x, m.numpy(), w.numpy(), float(s) ** 2)
        for w, m, s in zip(loadings, loc, scale, strict=True)
    ]
    torch.testing.assert_close(value, torch.tensor(np.array(expected)), rtol=1e-12, atol=1e-12)
