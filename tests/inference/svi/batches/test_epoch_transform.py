"""Data transformed in each epoch: eagerly and captured, repeatably, and with checks."""

import itertools
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import nn

import combinations
import oracles
import user_pairs
from ppl_vae import ELBO, PPCA, VAE, Bernoulli, ExactGuide, Gaussian, fit_svi
from ppl_vae.data.grey_values import Dequantization, binarize
from ppl_vae.inference.svi.batches.schedule import Schedule, epoch_generator
from ppl_vae.inference.svi.steps.capture_policy import best_unroll

N, D, B = 40, 6, 10


def grey(rows=N):
    return torch.rand(rows, D, generator=torch.Generator().manual_seed(0)).double()


def pair(likelihood=None):
    likelihood = Bernoulli() if likelihood is None else likelihood
    vae = VAE.mlp(D, 2, hidden=(5,), likelihood=likelihood, seed=0).double()
    return vae.model, vae.guide


class RecordingPair:
    """A pair that stores the rows of each run and their values."""

    def __init__(self):
        self.batches, self.decode, self.encode = [], nn.Linear(2, D), nn.Linear(D, 2)

    def model(self, x, *, index=None, num_data=None):
        rows = torch.arange(len(x)) if index is None else index
        with pyro.plate("data", num_data or len(x), subsample=rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decode(z)).to_event(1), obs=x)

    def guide(self, x, *, index=None, num_data=None):
        rows = torch.arange(len(x)) if index is None else index
        self.batches.append((rows.clone(), x.clone()))
        with pyro.plate("data", num_data or len(x), subsample=rows):
            pyro.sample("z", dist.Normal(self.encode(x), 1.0).to_event(1))


def data_of_epochs(x, epochs=16, batch_size=B):
    """The data of each epoch, from the batches of a fit, (epochs, N, D)."""
    pair = RecordingPair()
    fit_svi(
        pair.model, pair.guide, x, epochs=epochs, batch_size=batch_size, seed=0, capture=False,
        epoch_transform=binarize,
    )  # fmt: skip
    found, per_epoch = [], -(-len(x) // batch_size)
    steps = pair.batches[-epochs * per_epoch :]
    for epoch in range(epochs):
        rows, values = zip(*steps[epoch * per_epoch : (epoch + 1) * per_epoch], strict=True)
        whole = torch.full_like(x, torch.nan)
        whole[torch.cat(rows)] = torch.cat(values)
        found.append(whole)
    return torch.stack(found)


def test_each_epoch_is_binarized_independently_with_the_grey_values_as_probabilities():
    x = grey().float()
    values = data_of_epochs(x)
    assert set(values.unique().tolist()) == {0.0, 1.0}
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(values))
    z = (values.mean(0) - x) / (x * (1 - x) / len(values)).sqrt()
    # Sums over pixels: the mean of one pixel is not yet approximately normal.
    total = float(z.sum()) / np.sqrt(z.numel())
    assert abs(total) < oracles.z_limit(2)
    square = float((z.square() - 1).sum()) / np.sqrt(float(_kurtosis(x, len(values)).sum()))
    assert abs(square) < oracles.z_limit(2)


def _kurtosis(p, n):
    # The variance of z^2 for the mean of n Bernoulli draws: 2 + (1 - 6 p (1 - p)) / (n p (1 - p)).
    return 2 + (1 - 6 * p * (1 - p)) / (n * p * (1 - p))


def test_all_rows_are_binarized_at_the_start_of_an_epoch():
    # Fits of the whole data and of minibatches have equal data in each epoch.
    whole, batches = data_of_epochs(grey().float(), 6, N), data_of_epochs(grey().float(), 6)
    assert torch.equal(whole, batches)


@pytest.mark.parametrize("size", combinations.one_in(3, [15, 20, None]))
def test_captured_fits_equal_eager_fits(size, uncompiled):
    found = []
    for capture in (False, True):
        model, guide = pair()
        fit = fit_svi(
            model, guide, grey(), epoch_transform=binarize, batch_size=size, lr=1e-2, seed=0,
            capture=capture, steps=9,
        )  # fmt: skip
        found.append(fit)
    assert [fit.execution.split(",")[0].split(":")[0] for fit in found] == ["eager", "compiled"]
    assert (found[0].objective - found[1].objective).abs().max() < 1e-10


def shifted(x, generator):
    return x + torch.randn((), generator=generator, dtype=x.dtype)


@pytest.mark.slow
def test_compiled_fits_use_the_transformed_data():
    # With the exact guide and the KL on the same draw the objective does not depend on draws.
    x, found = torch.from_numpy(oracles.simulate_ppca((9, 4), 1, N, D, seed=0)), []
    for capture in (False, True):
        ppca = PPCA.like(x, 2, seed=0)
        fit = fit_svi(
            ppca.model, ExactGuide(ppca), x, objective=ELBO(kl="sampled"), steps=40,
            batch_size=B, lr=1e-2, seed=0, capture=capture, epoch_transform=shifted,
        )  # fmt: skip
        found.append(fit)
    assert found[1].execution.startswith("compiled, 4 steps per call")
    assert (found[0].objective - found[1].objective).abs().max() < 1e-8


def test_steps_of_two_epochs_are_not_in_one_call():
    assert best_unroll(Schedule(1000, 500, 10_000, refresh=True)) == 2
    assert best_unroll(Schedule(1000, 500, 10_000)) > 2


def test_fits_are_repeatable_and_do_not_change_the_generators():
    before = torch.get_rng_state()
    runs = [
        fit_svi(
            *pair(), grey(), steps=12, batch_size=B, epoch_transform=binarize, seed=seed
        ).objective
        for seed in (0, 0, 1)
    ]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_transform_and_the_order_of_rows_are_independent():
    # With one stream for both, the binarized values would depend on positions.
    order = torch.rand(1000, generator=torch.Generator().manual_seed(7))
    drawn = torch.rand(1000, generator=epoch_generator(7, 0))
    assert stats.spearmanr(order, drawn).pvalue > oracles.FAILURE_RATE
    assert not torch.equal(drawn, torch.rand(1000, generator=epoch_generator(7, 1)))
    assert torch.equal(drawn, torch.rand(1000, generator=epoch_generator(7, 0)))


def test_validation_rows_are_not_transformed():
    x_val = binarize(grey(9), torch.Generator().manual_seed(1))
    fit = partial(
        fit_svi, *pair(), grey(), epochs=30, batch_size=B, seed=0, epoch_transform=binarize
    )
    assert len(fit(x_val=x_val).validation) > 1
    with pytest.raises(ValueError, match=r"x_val: x has 54 entries outside \{0, 1\}"):
        fit(x_val=grey(9))


def test_missing_values_with_an_epoch_transform():
    x = grey()
    x[torch.rand(N, D, generator=torch.Generator().manual_seed(3)) < 0.2] = torch.nan
    fit = fit_svi(*pair(), x, steps=8, batch_size=B, epoch_transform=binarize, seed=0)
    assert fit.objective.isfinite().all()


def test_dequantization_is_an_epoch_transform():
    x = (grey() * 255).round() / 255
    model, guide = pair(Gaussian("shared"))
    fit = fit_svi(model, guide, x, steps=8, epoch_transform=Dequantization().apply, seed=0)
    assert fit.objective.isfinite().all()


@pytest.mark.parametrize("name", user_pairs.PAIRS)
def test_external_pairs_with_an_epoch_transform(name):
    model, guide, x = user_pairs.PAIRS[name]()
    draws = []

    def same(rows, generator):
        draws.append(float(torch.rand((), generator=generator)))
        return rows.clone()

    fit = fit_svi(model, guide, x, epoch_transform=same, steps=3, lr=1e-3, seed=0, capture=False)
    assert len(draws) == len(set(draws)) == 4  # one at the start, one per epoch
    assert fit.objective.isfinite().all()


def not_finite(x, generator):
    return x / 0


class Halved:
    def __call__(self, x, generator):
        return x[:, :3]


@pytest.mark.parametrize(
    ("transform", "match"),
    [
        (Halved(), r"finite data of shape \(40, 6\), torch.float64 and on cpu.*Halved did not"),
        (not_finite, "not_finite did not"),
        (lambda x, generator: x.numpy(), "did not"),
        (lambda x, generator: x.float(), "did not"),
        (lambda x, generator: x, r"x has 240 entries outside \{0, 1\}"),
    ],
)
def test_transformed_data_are_checked(transform, match):
    with pytest.raises(ValueError, match=match):
        fit_svi(*pair(), grey(), steps=3, epoch_transform=transform)


def test_a_checkpoint_with_another_transform_is_rejected(tmp_path):
    file = tmp_path / "fit.pt"
    fit_svi(*pair(), grey(), epoch_transform=binarize, steps=25, seed=0, checkpoint=file)
    binary = binarize(grey(), torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="epoch_transform is binarize, here it is None"):
        fit_svi(*pair(), binary, steps=25, seed=0, checkpoint=file)
