"""The benchmark for a GPU runs on a pretended one, and its table says what failed."""

import sys
from pathlib import Path

import pytest
import torch

import pretend_device

sys.path.append(str(Path(__file__).parent / "benchmarks"))

import gpu

pretend_device.register()


@pytest.mark.skipif(
    bool(pretend_device.STATE.unsupported), reason=pretend_device.STATE.unsupported
)
@pytest.mark.parametrize("name", gpu.PARTS)
def test_every_part_runs(name, monkeypatch):
    monkeypatch.setenv("PPL_VAE_DATA", "nowhere")
    with pretend_device.pretended_device() as device:
        rows = gpu.run_part(name, gpu.TINY, device)
    assert rows
    assert not [row for row in rows if row["value"].startswith("failed")]


def test_a_part_that_fails_has_a_row_with_the_reason(monkeypatch):
    def part(size, device):
        raise RuntimeError("no such device\nmore")

    monkeypatch.setitem(gpu.PARTS, "ppca", (part, 0.1))
    rows = gpu.run_part("ppca", gpu.TINY, torch.device("cpu"))
    assert gpu.table(rows).splitlines() == [
        "| part | measured | value |",
        "|---|---|---|",
        "| ppca | the whole part | failed: RuntimeError: no such device |",
    ]


@pytest.mark.parametrize(
    ("limit", "options", "message"),
    [
        (0.01, [], "not done within 0 s"),
        pytest.param(60, ["--device", "nonsense"], "exit 1: RuntimeError", marks=pytest.mark.slow),
    ],
)
def test_a_process_that_hangs_or_ends_has_a_row_with_the_reason(limit, options, message):
    (row,) = gpu.run_apart("ppca", limit, [*options, "--size", "tiny"])
    assert message in row["value"]


def test_the_parts_fit_into_eight_minutes():
    assert sum(share for _, share in gpu.PARTS.values()) <= 1.0
