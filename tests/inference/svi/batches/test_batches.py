"""The rows of each batch: remaining rows of an epoch, and batch normalisation."""

import pytest
import torch
from torch import nn

from ppl_vae.capture import policy
from ppl_vae.capture.policy import is_worth_compiling
from ppl_vae.guides.guides import PerDatumGuide
from ppl_vae.inference.svi.batches.schedule import Schedule
from ppl_vae.inference.svi.fit import fit_svi
from ppl_vae.inference.svi.steps.capture_policy import best_unroll, compiled_fraction
from ppl_vae.likelihoods.gaussian import Gaussian
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.vae import VAE

D, K = 5, 2


def sizes_of_epochs(schedule, order_seed=3):
    """Sizes of the batches, epoch by epoch, and the rows in them."""
    batches = list(schedule.batches(order_seed))
    count = schedule.steps_per_epoch
    epochs = [batches[k : k + count] for k in range(0, len(batches), count)]
    return [[len(rows) for rows in epoch] for epoch in epochs], [torch.cat(e) for e in epochs]


@pytest.mark.parametrize(
    ("num_data", "batch_size", "kept", "dropped"),
    [
        (12, 4, [4, 4, 4], [4, 4, 4]),
        (13, 4, [4, 4, 5], [4, 4, 4]),
        (14, 4, [4, 4, 4, 2], [4, 4, 4]),
        (15, 4, [4, 4, 4, 3], [4, 4, 4]),
        (9, 2, [2, 2, 2, 3], [2, 2, 2, 2]),
        (5, 1, [1] * 5, [1] * 5),
        (7, 5, [5, 2], [5]),
    ],
)
@pytest.mark.parametrize("epochs", [1, 4])
def test_a_single_row_joins_the_batch_before_it(num_data, batch_size, kept, dropped, epochs):
    for drop_last, expected in ((False, kept), (True, dropped)):
        schedule = Schedule.of(num_data, batch_size, epochs, None, drop_last=drop_last)
        sizes, rows = sizes_of_epochs(schedule)
        assert sizes == [expected] * epochs
        assert schedule.num_steps == epochs * len(expected)
        for drawn in rows:
            assert len(drawn.unique()) == len(drawn) == sum(expected)


def test_all_rows_but_one_are_all_rows():
    assert list(Schedule.of(6, 5, 3, None).batches(0)) == [None] * 3
    assert [len(rows) for rows in Schedule.of(6, 5, 3, None, drop_last=True).batches(0)] == [5] * 3


@pytest.mark.parametrize("start", [0, 1, 4, 5, 7, 11])
def test_batches_from_any_step_are_those_of_the_whole_schedule(start):
    schedule = Schedule.of(13, 4, None, 11)
    whole = list(schedule.batches(2))
    later = list(schedule.batches(2, start=start))
    assert len(whole) == 11 and [len(r) for r in whole[:6]] == [4, 4, 5, 4, 4, 5]
    assert all(torch.equal(a, b) for a, b in zip(whole[start:], later, strict=True))


def test_dropped_rows_differ_between_epochs_and_are_counted():
    one = Schedule.of(13, 4, 1, None, drop_last=True)
    many = Schedule.of(13, 4, 30, None, drop_last=True)
    assert one.num_never_drawn(0) == 1
    assert many.num_never_drawn(0) == 0
    _, rows = sizes_of_epochs(many, 0)
    left_out = {(set(range(13)) - set(drawn.tolist())).pop() for drawn in rows}
    assert len(left_out) > 5
    partial = Schedule.of(100, 30, None, 2, drop_last=True)
    assert partial.num_never_drawn(0) == 40


def test_the_compiled_fraction_of_an_epoch():
    assert best_unroll(Schedule(1001, 100, 10_000)) == best_unroll(Schedule(900, 100, 10_000))
    assert compiled_fraction(Schedule(1000, 100, 10_000)) == 1.0
    assert compiled_fraction(Schedule(1001, 100, 10_000)) == pytest.approx(9 / 10)
    assert compiled_fraction(Schedule(1050, 100, 10_000)) == pytest.approx(10 / 11)
    assert compiled_fraction(Schedule(1050, 100, 10_000, drop_last=True)) == 1.0
    assert compiled_fraction(Schedule(100, 60, 10_000)) == 0.5


def test_compiling_is_estimated_by_the_time_that_recording_took(monkeypatch):
    assert is_worth_compiling(100.0, 1.0, in_background=True)
    assert not is_worth_compiling(80.0, 1.0, in_background=True)
    monkeypatch.setattr(policy, "measured_time", lambda: 20.0)
    assert is_worth_compiling(31.0, 1.0, in_background=True)
    assert not is_worth_compiling(29.0, 1.0, in_background=True)
    assert is_worth_compiling(100.0, 1.0, in_background=False)
    assert not is_worth_compiling(80.0, 1.0, in_background=False)


# Networks that need two rows


def normalised(seed=0):
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Linear(D, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2 * K))
    decoder = nn.Sequential(nn.Linear(K, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, D))
    return VAE(
        decoder=decoder,
        encoder=encoder,
        likelihood=Gaussian("shared"),
        data_dim=D,
        latent_dim=K,
    )


def data(num_data, seed=0):
    return torch.randn(num_data, D, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", [{"epochs": 3}, {"steps": 7}])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("num_data", "batch_size"), [(41, 20), (41, 40), (13, 4), (7, 2)])
def test_batch_normalisation_trains_with_any_remainder(num_data, batch_size, length, drop_last):
    vae = normalised()
    fit = fit_svi(
        vae.model, vae.guide, data(num_data), batch_size=batch_size, drop_last=drop_last, **length
    )
    assert torch.isfinite(fit.objective).all()
    expected = f"drop_last left 1 of {num_data} rows out of each epoch, different ones in each"
    assert any(expected in note for note in fit.notes) == drop_last


def test_all_data_are_in_an_epoch_with_a_larger_last_batch():
    """Each q_i is updated in one epoch, except for those of dropped rows."""
    x = data(41).double()
    for drop_last, updated in ((False, 41), (True, 40)):
        ppca, guide = PPCA.like(x, K, seed=0), PerDatumGuide(41, K).double()
        fit_svi(ppca.model, guide, x, epochs=1, batch_size=20, lr=0.1, drop_last=drop_last, seed=0)
        assert int((guide.loc != 0).any(1).sum()) == updated


def test_validation_with_a_larger_last_batch():
    vae = normalised()
    fit = fit_svi(
        vae.model, vae.guide, data(41), x_val=data(9, 1), epochs=60, batch_size=20, seed=0
    )
    assert fit.steps == 120 and fit.validation_steps.tolist() == [0, 26, 52, 78, 104, 120]


@pytest.mark.parametrize("drop_last", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_captured_steps_with_a_larger_last_batch_equal_eager_steps(drop_last, uncompiled):
    x, objectives = data(41).double(), []
    for capture in (False, True):
        vae = VAE.mlp(D, K, hidden=(4,), seed=0).double()
        fit = fit_svi(
            vae.model, vae.guide, x, steps=13, batch_size=8, drop_last=drop_last, seed=0,
            capture=capture, lr=1e-2,
        )  # fmt: skip
        assert fit.execution.startswith("compiled" if capture else "eager")
        objectives.append(fit.objective)
    torch.testing.assert_close(*objectives, rtol=1e-9, atol=1e-9)
