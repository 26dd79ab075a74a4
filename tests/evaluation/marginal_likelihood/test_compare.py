"""Models ranked on the same held-out data: numpy by hand, what must not matter, messages."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from ppl_vae import PPCA, VAE, fit_closed_form, log_likelihood
from ppl_vae.evaluation.marginal_likelihood.compare import Comparison, compare
from ppl_vae.evaluation.marginal_likelihood.estimate import LogLikelihood

NUMBERS = ("mean", "error", "difference", "difference_error", "reliable")


def scores(num_models=3, num_data=50, seed=0):
    """Log-likelihoods that vary together over the data, by name; the last is the best."""
    rng = np.random.default_rng(seed)
    common = 10 * rng.normal(size=num_data)
    own = rng.normal(size=(num_models, num_data))
    return {f"model {m}": common + own[m] + m for m in range(num_models)}


def estimated(value, reliable):
    value = torch.as_tensor(value)
    none = torch.full_like(value, 0.3)
    return LogLikelihood(value, none, none, none, torch.as_tensor(reliable), 100, "importance", 0)


def assert_same(a, b, **tolerance):
    assert a.names == b.names
    for name in NUMBERS:
        torch.testing.assert_close(getattr(a, name), getattr(b, name), **tolerance)


def test_numpy_by_hand():
    values = scores()
    found = compare(values)
    assert found.names == ("model 2", "model 1", "model 0") and found.num_data == 50
    best = values["model 2"]
    for place, name in enumerate(found.names):
        behind = values[name] - best
        expected = (
            values[name].mean(),
            values[name].std(ddof=1) / math.sqrt(50),
            behind.mean(),
            behind.std(ddof=1) / math.sqrt(50),
            1.0,
        )
        assert [float(getattr(found, n)[place]) for n in NUMBERS] == pytest.approx(expected)
    assert np.array_equal(found.pointwise, [values[name] for name in found.names])
    assert found.difference[0] == found.difference_error[0] == 0
    assert all(getattr(found, n).dtype == torch.float64 for n in (*NUMBERS, "pointwise"))


def test_values_may_be_arrays_of_any_kind():
    values = scores()
    a, b, c = values.values()
    found = compare({"model 0": a.tolist(), "model 1": torch.tensor(b), "model 2": c})
    assert_same(found, compare(values))
    halves = compare(
        {"a": torch.tensor(a, dtype=torch.float32, requires_grad=True), "b": [1] * 50}
    )
    assert halves.mean.dtype == torch.float64 and not halves.mean.requires_grad


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(2, 40), st.integers(0, 1000))
def test_a_common_term_changes_no_difference(num_models, num_data, seed):
    values = scores(num_models, num_data, seed)
    before = compare(values)
    shared = 100 * np.random.default_rng(seed + 1).normal(size=num_data)
    after = compare({name: value + shared for name, value in values.items()})
    assert after.names == before.names
    for name in ("difference", "difference_error"):
        ours, theirs = getattr(after, name), getattr(before, name)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    assert bool((before.difference <= 0).all()) and bool((before.difference_error >= 0).all())


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(2, 40), st.integers(0, 1000))
def test_the_order_of_data_and_of_models_does_not_matter(num_models, num_data, seed):
    values = scores(num_models, num_data, seed)
    order = np.random.default_rng(seed).permutation(num_data)
    again = compare({name: values[name][order] for name in reversed(values)})
    assert_same(again, compare(values), rtol=1e-9, atol=1e-12)


def test_pairing_removes_common_variation():
    found = compare(scores(num_data=400))
    unpaired = (found.error[1:].square() + found.error[0] ** 2).sqrt()
    # Common sd 10 against own sd 1: sqrt(2 * 101) against sqrt(2) over sqrt(N).
    ratio = unpaired / found.difference_error[1:]
    assert torch.allclose(ratio, torch.tensor(math.sqrt(101), dtype=ratio.dtype), rtol=0.15)


@pytest.mark.slow
def test_the_paired_error_agrees_with_repetitions():
    """Over many data sets, difference / error has mean 0 and variance 1 for equal models."""
    z = []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        common = 10 * rng.normal(size=100)
        found = compare({k: common + rng.normal(size=100) for k in "ab"})
        z.append(float(found.difference[1] / found.difference_error[1]))
    # The loser's z is -|t| with 99 degrees of freedom, E t^2 = 99 / 97, Var t^2 = 2.15.
    error = math.sqrt(2.15 / len(z))
    assert abs(np.mean(np.square(z)) - 99 / 97) < oracles.z_limit() * error


def test_one_model_and_ties():
    alone = compare({"alone": [1.0, 3.0]})
    assert alone.names == ("alone",) and alone.difference.tolist() == [0.0]
    tied = compare({"first": [1.0, 3.0], "second": [1.0, 3.0]})
    assert tied.names == ("first", "second") and tied.difference_error.tolist() == [0.0, 0.0]


def test_the_reliability_of_estimates_is_reported():
    good = [True] * 6 + [False]
    found = compare(
        {
            "sure": torch.arange(7.0).double(),
            "mostly": estimated(np.arange(7.0) - 1, good),
            "hardly": estimated(np.arange(7.0) - 2, [True] + [False] * 6),
        }
    )
    assert found.reliable.tolist() == pytest.approx([1, 6 / 7, 1 / 7])


def test_real_models():
    x = oracles.simulate_ppca((9, 4), 1, 120, 5, seed=0)
    ppca, vae = PPCA.like(x[:80], 2), VAE.mlp(5, 2, hidden=(8,), seed=0)
    fit_closed_form(ppca, x[:80])
    untrained = log_likelihood(vae.model, vae.guide, x[80:], 200, seed=0)
    found = compare({"vae": untrained, "ppca": ppca.log_likelihood(x[80:])})
    assert found.names == ("ppca", "vae") and found.num_data == 40
    assert float(found.mean[1]) == pytest.approx(untrained.mean)
    assert float(found.error[1]) == pytest.approx(untrained.mean_error)
    assert float(found.reliable[1]) == untrained.share_reliable


@pytest.mark.parametrize("size", [1.0, 1e4])
def test_stacking_weights_are_those_of_the_most_probable_mixture(size):
    rng = np.random.default_rng(1)
    # Two models that are good for different data, and one that is good for none.
    common, good = -size * rng.random(200), rng.random(200) < 0.7
    pointwise = [np.where(good, 0.0, -4.0), np.where(good, -3.0, 0.0), np.full(200, -5.0)]
    values = {n: common + v for n, v in zip("abc", pointwise, strict=True)}
    found = compare(values)
    weights = dict(zip(found.names, found.weight.tolist(), strict=True))
    assert set(weights) == set("abc") and sum(weights.values()) == pytest.approx(1, abs=1e-6)
    densities = np.exp(pointwise)

    def score(w):
        return np.log(w @ densities).mean()

    shares = np.linspace(0, 1, 501)
    best = max(score(np.array([w, 1 - w, 0.0])) for w in shares)
    assert score(np.array([weights[n] for n in "abc"])) == pytest.approx(best, abs=1e-4)
    assert weights["c"] < 0.02 and 0.6 < weights["a"] < 0.8


def test_weights_do_not_depend_on_units_and_are_equal_for_equal_models():
    values = scores()
    found, moved = compare(values), compare({k: v + 500.0 for k, v in values.items()})
    torch.testing.assert_close(found.weight, moved.weight, atol=1e-6, rtol=0)
    assert found.weight.sum() == pytest.approx(1) and (found.weight >= 0).all()
    assert compare({"alone": [1.0, 2.0]}).weight.tolist() == [1]


def test_a_comparison_prints():
    text = repr(
        compare(
            {
                "bad": estimated([-3.0, -2.0, -4.0], [False, False, True]),
                "good one": estimated([1.0, 2.0, 0.0], [True, True, True]),
            }
        )
    )
    lines = text.splitlines()
    assert lines[0].startswith("log p of 3 data points, nats per datum, ± one standard")
    assert " ".join(lines[1].split()) == "good one 1.000 ± 0.577 best 100 % reliable weight 1.00"
    behind = "bad ≥-3.000 ± 0.577 -4.000 ± 0.000 33 % reliable weight 0.00"
    assert " ".join(lines[2].split()) == behind
    assert "≥: under 85% reliable, a lower bound" in lines[3]
    assert len({len(line) for line in lines[1:3]}) == 1
    assert "≥" not in repr(compare({"exact": [1.0, 2.0]}))


def test_a_frame_has_one_row_per_model():
    found = compare(scores())
    frame = found.to_frame()
    assert tuple(frame.index) == found.names and frame.index.name == "model"
    assert tuple(frame.columns) == (*NUMBERS, "weight")
    assert np.array_equal(frame["difference"], found.difference)


def test_a_comparison_is_frozen_and_converts_to_json():
    found = compare(scores())
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.mean = None
    again = Comparison.from_dict(found.to_dict())
    assert_same(again, found, rtol=0, atol=0)
    assert torch.equal(again.pointwise, found.pointwise)


@pytest.mark.parametrize(
    ("estimates", "message"),
    [
        ({}, "nothing to compare"),
        ({"a": [1.0, 2.0], "b": [1.0]}, r"the same data.*'a': 2, 'b': 1"),
        ({"a": [1.0]}, "at least 2 data points"),
        ({"a": [1.0, 2.0], "b": [math.nan, math.inf]}, "'b' is NaN or infinite for 2 of 2"),
        ({"a": [[1.0, 2.0]]}, r"'a' must be 1-d.*\(1, 2\)"),
        ({"a": 3.0}, r"'a' must be 1-d.*\(\)"),
    ],
)
def test_invalid_arguments_raise(estimates, message):
    with pytest.raises(ValueError, match=message):
        compare(estimates)
