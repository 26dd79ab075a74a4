"""Masks and rows on an accelerator beside tables that are read on the CPU."""

import numpy as np
import pytest
import torch
from torch.utils.data import StackDataset

import pretend_device
from ppl_vae.data.image_grid import ImageGrid
from ppl_vae.data.sources.array_source import ArraySource
from ppl_vae.data.sources.row_sources import row_source
from pretend_device import pretended_device

X = np.arange(12.0).reshape(4, 3)
OBSERVED = X % 5 != 0

pretend_device.register()
pytestmark = pytest.mark.skipif(
    bool(pretend_device.STATE.unsupported), reason=pretend_device.STATE.unsupported
)


def observed_entries(x, mask=None):
    source = ArraySource(x, mask) if isinstance(x, np.ndarray) else row_source(x, mask)
    blocks = [source.read(*pair) for pair in ((0, 2), (2, 4))]
    return ~torch.cat(blocks).isnan()


@pytest.mark.parametrize("kind", ["array", "blocks", "blocks and masks", "dataset"])
def test_a_mask_may_be_on_an_accelerator(kind):
    with pretended_device() as device:
        mask = torch.from_numpy(OBSERVED).to(device)
        found = {
            "array": lambda: observed_entries(X, mask),
            "blocks": lambda: observed_entries([X[:2], X[2:]], mask),
            "blocks and masks": lambda: observed_entries([X[:2], X[2:]], [mask[:2], mask[2:]]),
            "dataset": lambda: observed_entries(StackDataset(torch.from_numpy(X), mask)),
        }[kind]()
    np.testing.assert_array_equal(found, OBSERVED)


def test_the_scale_of_a_grid_is_that_of_rows_on_an_accelerator():
    train = torch.tensor([[3.0, np.nan], [-1.0, 2.0]])
    with pretended_device() as device:
        grid = ImageGrid.of(train[None, :1].to(device), ["a"], ["b"], train.to(device), (1, 2))
    assert grid.limits == (-1.0, 3.0)
