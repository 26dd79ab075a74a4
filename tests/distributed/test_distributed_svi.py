"""SVI of batches that several processes share."""

import math

import pytest
import svi_cases as cases
import torch
from tables import close, table

from ppl_vae import IWAE


def check(two, x, options, pair_options=None):
    alone, objective, _, _ = cases.fit_given(x, options | {"capture": False}, pair_options)
    found = two.run(cases.fit_given, x, options, pair_options)
    for state, values, *_ in found:
        assert all(torch.equal(state[name], found[0][0][name]) for name in state)
        close(values, objective)
        for name, value in alone.items():
            close(state[name], value)
    return found


BATCHES = [
    {"steps": 5},
    {"steps": 9, "batch_size": 20},
    {"epochs": 2, "batch_size": 25, "drop_last": True},
    {"steps": 40, "batch_size": 3},
    {"steps": 6, "batch_size": 1},
]


@pytest.mark.parametrize("options", BATCHES, ids=str)
def test_batches_are_shared(two, options):
    check(two, table(31), {"lr": 0.05, **options})


OPTIONS = {
    "gradient clipping": {"grad_clip": 0.1},
    "momentum": {"optimizer": torch.optim.SGD, "lr": 1e-3},
    "a scheduler": {"scheduler": torch.optim.lr_scheduler.CosineAnnealingLR},
    "warm-up": {"warmup": 5},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(two, name):
    check(two, table(31), {"steps": 8, "batch_size": 10, "lr": 0.05} | OPTIONS[name])


def test_missing_values(two):
    check(two, table(31, missing=0.2), {"steps": 8, "batch_size": 10, "lr": 0.05})


@pytest.mark.parametrize("batch_size", [None, 10])
def test_parameters_per_datum(two, batch_size):
    options = {"steps": 8, "batch_size": batch_size, "lr": 0.05}
    found = check(two, table(30), options, {"per_datum": True})
    # Failure and flags of four parameters, value, W, bias, log scale, rows of the batch.
    size = 8 * (1 + 4 + 1 + 7 * 2 + 7 + 2 + 2 * (batch_size or 30))
    assert found[0][3]["sum", size] == 7  # the first one has all buffers too


def test_batch_normalisation(two):
    """Each process normalises its own share; the moving averages are averages of all."""
    options = {"steps": 8, "batch_size": 10, "lr": 0.05}
    found = two.run(cases.fit_given, table(31), options, {"normalized": True})
    first, second = (state for state, *_ in found)
    assert all(torch.equal(first[name], second[name]) for name in first)
    alone, *_ = cases.fit_given(table(31), options, {"normalized": True})
    close(first["norm.running_mean"], alone["norm.running_mean"])
    assert int(first["norm.num_batches_tracked"]) == 8


def test_early_stopping_is_agreed(two):
    x = table(60)
    options = {"epochs": 200, "batch_size": 20, "lr": 0.03, "patience": 1, "capture": False}
    found = two.run(cases.fit_vae, x[:45], options, x[45:])
    (first, result), (second, other) = found
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert result.stopped == other.stopped
    assert result.validation.tolist() == other.validation.tolist()


def test_a_checkpoint_continues_under_another_number_of_processes(two, tmp_path):
    x, options = table(31), {"batch_size": 10, "lr": 0.05}
    whole, objective, *_ = cases.fit_given(x, {"steps": 60, **options})
    stored = {"checkpoint": str(tmp_path / "of two"), **options}
    two.run(cases.fit_given, x, {"steps": 27, **stored})
    for _, values, *_ in two.run(cases.fit_given, x, {"steps": 30, **stored}):
        close(values, objective[:30])
    state, values, *_ = cases.fit_given(x, {"steps": 60, **stored})
    close(values, objective)
    close(state["decoder.weight"], whole["decoder.weight"])
    stored["checkpoint"] = str(tmp_path / "of one")
    cases.fit_given(x, {"steps": 27, **stored})
    for state, values, *_ in two.run(cases.fit_given, x, {"steps": 60, **stored}):
        close(values, objective)
        close(state["decoder.weight"], whole["decoder.weight"])


def test_random_draws_resume_bit_for_bit(two, tmp_path):
    x, options = table(31), {"batch_size": 10, "capture": False}
    whole = two.run(cases.fit_vae, x, {"steps": 60, **options})
    stored = {"checkpoint": str(tmp_path / "fit"), **options}
    two.run(cases.fit_vae, x, {"steps": 30, **stored})
    resumed = two.run(cases.fit_vae, x, {"steps": 60, **stored})
    for (state, _), (expected, _) in zip(resumed, whole, strict=True):
        assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("batch_size", [None, 10])
def test_recorded_steps(two, batch_size):
    options = {"steps": 6, "batch_size": batch_size, "capture": "recorded"}
    found = check(two, table(30), options)
    assert found[0][2].execution.startswith("recorded")


@pytest.mark.slow
def test_captured_steps(two):
    found = check(two, table(30), {"steps": 6, "batch_size": 10, "capture": True})
    assert found[0][2].execution.startswith("compiled, the gradient of each step")


@pytest.mark.slow
@pytest.mark.parametrize("capture", [False, "recorded"])
@pytest.mark.parametrize("rows", [3, 31])
def test_four_processes(four, rows, capture):
    """With batches that no multiple of four divides, some of them of fewer rows than processes."""
    x = table(rows, missing=0.2)
    x[1:, 3] = math.nan  # one process observes this column
    options = {"steps": 8, "lr": 0.05, "capture": capture}
    for batch_size in (None, min(rows, 10), 3):
        check(four, x, options | {"batch_size": batch_size})
    check(four, x.nan_to_num(), options | {"batch_size": 3}, {"per_datum": True})


@pytest.mark.slow
def test_a_checkpoint_of_four_processes(four, two, tmp_path):
    x, options = table(31), {"batch_size": 10, "lr": 0.05, "checkpoint": str(tmp_path / "fit")}
    four.run(cases.fit_given, x, {"steps": 27} | options)
    two.run(cases.fit_given, x, {"steps": 40} | options)
    _, objective, *_ = cases.fit_given(x, {"steps": 60, "batch_size": 10, "lr": 0.05})
    for _, values, *_ in four.run(cases.fit_given, x, {"steps": 60} | options):
        close(values, objective)


def test_processes_draw_independently(two):
    noise = two.run(cases.draws_of_a_fit, table(20))
    assert not set(noise[0]) & set(noise[1])


DIFFERENT = {
    "lr": ({"lr": 0.1}, {"lr": 0.2}, "fit_svi: lr is 0.2 on rank 1 and 0.1 on rank 0"),
    "seed": ({"seed": 1}, {"seed": 2}, "fit_svi: seed is 2 on rank 1 and 1 on rank 0"),
    "rows": ({"rows": 30}, {"rows": 29}, "it must be the same on all processes"),
    "a mistake": ({}, {"batch_size": 99}, "batch_size=99 is larger than the data"),
    "data": ({}, {"shift": 1.0}, "fit_svi: x is 30 x 7"),
    "the dtype": ({}, {"dtype": torch.float32}, "fit_svi: model is [2] float32"),
    "missing values": ({}, {"missing": 4}, "fit_svi: "),
    "batch size": ({"batch_size": 10}, {"batch_size": 11}, "fit_svi: "),
    "steps": ({}, {"steps": 9}, "fit_svi: steps is 9 on rank 1"),
    "the optimizer": ({}, {"optimizer": torch.optim.SGD}, "fit_svi: optimizer"),
    "clipping": ({}, {"grad_clip": 1.0}, "fit_svi: "),
    "warm-up": ({}, {"warmup": 3}, "fit_svi: objective"),
    "the objective": ({}, {"objective": IWAE(3)}, "fit_svi: objective"),
    "validation": ({}, {"x_val": table(5)}, "x_val needs a guide that computes q"),
    "patience": ({}, {"patience": 3}, "patience"),
    "capture": ({}, {"capture": "recorded"}, "fit_svi: capture is recorded on rank 1"),
    "a bad lr": ({}, {"lr": -1.0}, "lr"),
    "a bad capture": ({}, {"capture": "x"}, "capture is x on rank 1"),
    "an error in a step": (
        {"fails_at": 3},
        {"fails_at": 3},
        "ZeroDivisionError: a mistake of the user",
    ),
    "divergence": ({"nan_at": 3}, {"nan_at": 3}, "the loss is not finite at step"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_is_named_on_every_process(two, name):
    first, second, message = DIFFERENT[name]
    for text in two.errors(cases.fit_of_rank, table(30), each=[(first,), (second,)]):
        assert message in text
