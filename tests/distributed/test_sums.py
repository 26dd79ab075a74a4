"""Sums of gradients over processes by memory that they share."""

import os

import pytest
import sum_cases as cases
import torch
from tables import table

memory_is_shared = pytest.mark.skipif(
    not hasattr(os, "memfd_create"), reason="the system has no anonymous files"
)


@memory_is_shared
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_are_those_of_one_process(two, dtype):
    assert two.run(cases.repeated_sums, dtype) == [(True, 10, True)] * 2


@memory_is_shared
@pytest.mark.slow
def test_sums_of_four_processes(four):
    assert four.run(cases.repeated_sums, torch.float64) == [(True, 10, True)] * 4


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_cannot_map_the_memory(two, rank):
    """All processes exchange messages then, with the same sums."""
    assert two.run(cases.repeated_sums, torch.float32, rank) == [(True, 10, False)] * 2


@memory_is_shared
def test_a_fit_is_that_of_messages(two):
    """Clipping changes gradients in place, on each process for itself."""
    shared, messages = (two.run(cases.large_fit, table(31), least) for least in (None, 2**40))
    for state in (*shared, *messages):
        assert all(torch.equal(state[name], messages[0][name]) for name in state)
    for mapped, opened in two.run(cases.files_of_this_process):
        assert (mapped, opened) == ([], [])
