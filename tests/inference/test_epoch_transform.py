"""Data made anew for each epoch: eager and captured, repeatable, and checked."""

import itertools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import nn

import foreign
import oracles
from ppl_vae import ELBO, PPCA, VAE, Bernoulli, ExactGuide, Gaussian, fit_svi
from ppl_vae.capture.compiled import CompiledFunction
from ppl_vae.data.transforms import Dequantization, binarize
from ppl_vae.inference.svi.capture_policy import best_unroll
from ppl_vae.inference.svi.schedule import Schedule, epoch_generator

N, D, B = 40, 6, 10


def grey(rows=N):
    return torch.rand(rows, D, generator=torch.Generator().manual_seed(0)).double()


def pair(likelihood=None):
    likelihood = Bernoulli() if likelihood is None else likelihood
    vae = VAE.mlp(D, 2, hidden=(5,), likelihood=likelihood, seed=0).double()
    return vae.model, vae.guide


class Watched:
    """A pair that remembers which rows it saw, and what they were."""

    def __init__(self):
        self.seen, self.decode, self.encode = [], nn.Linear(2, D), nn.Linear(D, 2)

    def model(self, x, *, index=None, num_data=None):
        rows = torch.arange(len(x)) if index is None else index
        with pyro.plate("data", num_data or len(x), subsample=rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decode(z)).to_event(1), obs=x)

    def guide(self, x, *, index=None, num_data=None):
        rows = torch.arange(len(x)) if index is None else index
        self.seen.append((rows.clone(), x.clone()))
        with pyro.plate("data", num_data or len(x), subsample=rows):
            pyro.sample("z", dist.Normal(self.encode(x), 1.0).to_event(1))


def epochs_seen(x, epochs=16, batch_size=B):
    """What each epoch's data were, from the batches of a fit, (epochs, N, D)."""
    watched = Watched()
    how = {"epochs": epochs, "batch_size": batch_size, "seed": 0, "capture": False}
    fit_svi(watched.model, watched.guide, x, epoch_transform=binarize, **how)
    found, per_epoch = [], -(-len(x) // batch_size)
    steps = watched.seen[-epochs * per_epoch :]
    for epoch in range(epochs):
        rows, values = zip(*steps[epoch * per_epoch : (epoch + 1) * per_epoch], strict=True)
        whole = torch.full_like(x, torch.nan)
        whole[torch.cat(rows)] = torch.cat(values)
        found.append(whole)
    return torch.stack(found)


def test_epoch_transform_has_coins_of_its_own_with_the_pixels_probabilities():
    x = grey().float()
    seen = epochs_seen(x)
    assert set(seen.unique().tolist()) == {0.0, 1.0}
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(seen))
    z = (seen.mean(0) - x) / (x * (1 - x) / len(seen)).sqrt()
    # Sums over cells: each cell alone has too few coins to be normal.
    total = float(z.sum()) / np.sqrt(z.numel())
    assert abs(total) < oracles.z_limit(2)
    square = float((z.square() - 1).sum()) / np.sqrt(float(_kurtosis(x, len(seen)).sum()))
    assert abs(square) < oracles.z_limit(2)


def _kurtosis(p, n):
    # The variance of z^2, for the mean of n coins: 2 + (1 - 6 p (1 - p)) / (n p (1 - p)).
    return 2 + (1 - 6 * p * (1 - p)) / (n * p * (1 - p))


def test_an_epoch_sees_one_drawing_of_all_its_rows():
    # A fit of whole batches has the epochs of its steps, and of minibatches the same drawings.
    whole, batches = epochs_seen(grey().float(), 6, N), epochs_seen(grey().float(), 6)
    assert torch.equal(whole, batches)


@pytest.fixture
def recorded_only(monkeypatch):
    """What is captured is recorded and not compiled, which is quick and gives the same."""
    compiled = CompiledFunction.__init__

    def without(self, *args, **how):
        compiled(self, *args, **(how | {"compiled": False}))

    monkeypatch.setattr(CompiledFunction, "__init__", without)


@pytest.mark.parametrize("size", [20, 15, None])
def test_captured_fits_are_the_eager_ones(size, recorded_only):
    found = []
    for capture in (False, True):
        model, guide = pair()
        how = {"batch_size": size, "lr": 1e-2, "seed": 0, "capture": capture, "steps": 9}
        found.append(fit_svi(model, guide, grey(), epoch_transform=binarize, **how))
    assert [fit.execution.split(",")[0].split(":")[0] for fit in found] == ["eager", "captured"]
    assert (found[0].objective - found[1].objective).abs().max() < 1e-10


def moved(x, generator):
    return x + torch.randn((), generator=generator, dtype=x.dtype)


@pytest.mark.slow
def test_compiled_fits_see_epoch_transforms_data():
    # With the exact guide and the KL on the same draw the objective does not depend on draws.
    x, found = torch.from_numpy(oracles.simulate_ppca((9, 4), 1, N, D, seed=0)), []
    for capture in (False, True):
        ppca = PPCA.like(x, 2, seed=0)
        how = {"steps": 40, "batch_size": B, "lr": 1e-2, "seed": 0, "capture": capture}
        pair = ppca.model, ExactGuide(ppca)
        found.append(fit_svi(*pair, x, objective=ELBO(kl="sampled"), epoch_transform=moved, **how))
    assert found[1].execution.startswith("captured, 4 steps per call")
    assert (found[0].objective - found[1].objective).abs().max() < 1e-8


def test_steps_of_two_epochs_do_not_go_together():
    assert best_unroll(Schedule(1000, 500, 10_000, anew=True)) == 2
    assert best_unroll(Schedule(1000, 500, 10_000)) > 2


def test_fits_repeat_and_leave_the_generators_alone():
    before = torch.get_rng_state()
    how = {"steps": 12, "batch_size": B, "epoch_transform": binarize}
    runs = [fit_svi(*pair(), grey(), **how, seed=s).objective for s in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_an_epochs_draws_are_not_those_of_its_order():
    # Both begin with the same seed: one stream for the two would tie coins to places.
    order = torch.rand(1000, generator=torch.Generator().manual_seed(7))
    drawn = torch.rand(1000, generator=epoch_generator(7, 0))
    assert stats.spearmanr(order, drawn).pvalue > oracles.FAILURE_RATE
    assert not torch.equal(drawn, torch.rand(1000, generator=epoch_generator(7, 1)))
    assert torch.equal(drawn, torch.rand(1000, generator=epoch_generator(7, 0)))


def test_validation_rows_are_taken_as_they_are():
    x_val = binarize(grey(9), torch.Generator().manual_seed(1))
    how = {"epochs": 30, "batch_size": B, "seed": 0, "epoch_transform": binarize}
    fit = fit_svi(*pair(), grey(), x_val=x_val, **how)
    assert len(fit.validation) > 1
    with pytest.raises(ValueError, match=r"x_val: x has 54 entries outside \{0, 1\}"):
        fit_svi(*pair(), grey(), x_val=grey(9), **how)


def test_holes_stay_holes():
    x = grey()
    x[torch.rand(N, D, generator=torch.Generator().manual_seed(3)) < 0.2] = torch.nan
    fit = fit_svi(*pair(), x, steps=8, batch_size=B, epoch_transform=binarize, seed=0)
    assert fit.objective.isfinite().all()


def test_dequantization_is_one_too():
    x = (grey() * 255).round() / 255
    model, guide = pair(Gaussian("shared"))
    fit = fit_svi(model, guide, x, steps=8, epoch_transform=Dequantization().apply, seed=0)
    assert fit.objective.isfinite().all()


@pytest.mark.parametrize("name", foreign.PAIRS)
def test_strangers_pairs(name):
    model, guide, x = foreign.PAIRS[name]()
    seen = []

    def same(rows, generator):
        seen.append(float(torch.rand((), generator=generator)))
        return rows.clone()

    how = {"steps": 3, "lr": 1e-3, "seed": 0, "capture": False}
    anew = fit_svi(model, guide, x, epoch_transform=same, **how)
    assert len(seen) == len(set(seen)) == 4  # one to begin with, one an epoch
    assert anew.objective.isfinite().all()


def not_finite(x, generator):
    return x / 0


class Halved:
    def __call__(self, x, generator):
        return x[:, :3]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (Halved(), r"finite data of shape \(40, 6\), torch.float64 and on cpu.*Halved did not"),
        (not_finite, "not_finite did not"),
        (lambda x, generator: x.numpy(), "did not"),
        (lambda x, generator: x.float(), "did not"),
        (lambda x, generator: x, r"x has 240 entries outside \{0, 1\}"),
    ],
)
def test_what_is_made_is_checked(make, match):
    with pytest.raises(ValueError, match=match):
        fit_svi(*pair(), grey(), steps=3, epoch_transform=make)


def test_a_checkpoint_of_other_data_is_refused(tmp_path):
    how = {"steps": 25, "seed": 0, "checkpoint": tmp_path / "fit.pt"}
    fit_svi(*pair(), grey(), epoch_transform=binarize, **how)
    with pytest.raises(ValueError, match="epoch_transform is binarize, here it is None"):
        fit_svi(*pair(), binarize(grey(), torch.Generator().manual_seed(0)), **how)
