"""Datasets and data loaders of torch as sources of rows."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)

from ppl_vae.core.arrays.entries import is_real
from ppl_vae.data.sources.array_source import IterableSource, same_rows
from ppl_vae.data.sources.block_source import (
    BLOCK_NUMBERS,
    BlockSource,
    as_block,
    as_host_array,
    uniform_parts,
)

ROWS_AT_ONCE = 256
"""The number of rows of an iterable dataset that form a block."""

ITEMS = "rows, (rows, labels) or (rows, mask)"


class DatasetSource(BlockSource):
    """The rows of a map-style dataset, found by their numbers.

    Items are rows, (row, label) or (row, mask): a second part is a mask if it is boolean and of
    the shape of the row. Rows of more than one dimension, such as images, are flattened.

    Args:
        dataset: the dataset.
        collate: makes a batch of a list of items, as for a ``DataLoader``; by default items are
            stacked.

    Raises:
        TypeError: if items are none of these.
        ValueError: if rows have different sizes.
    """

    is_divided, threaded = False, False

    def __init__(
        self, dataset: Dataset[Any], collate: Callable[[list[Any]], Any] | None = None
    ) -> None:
        self._dataset, self._collate = dataset, collate
        sized: Any = dataset
        if not hasattr(sized, "__len__"):
            raise TypeError(
                f"x is a Dataset without a length, {type(dataset).__name__}, whose rows cannot be "
                "found by their numbers; give it __len__, or make it an IterableDataset"
            )
        num_rows = len(sized)
        if not num_rows:
            raise ValueError("x is a dataset without items")
        self._tensors = dataset.tensors if isinstance(dataset, TensorDataset) else None
        self._tensors = None if collate is not None else self._tensors
        self._width: int | None = None
        first = self.read(0, 1)
        self._width = first.shape[1]
        size = max(1, BLOCK_NUMBERS // max(1, self._width))
        super().__init__(uniform_parts(num_rows, size), self._width)
        self.threaded = self._tensors is not None
        self.repeatable = self.threaded or same_rows(first, self.read(0, 1))

    def read(self, low: int, high: int) -> Tensor:
        """Rows on the CPU; see :meth:`.BlockSource.read`."""
        if self._tensors is not None:
            batch: Any = tuple(tensor[low:high] for tensor in self._tensors)
        else:
            batch = self._items(low, high)
        rows, has_labels = rows_of_batch(batch, low, self._width)
        self.has_labels = self.has_labels or has_labels
        return rows

    def _items(self, low: int, high: int) -> Any:
        dataset: Any = self._dataset
        if hasattr(dataset, "__getitems__"):
            items = list(dataset.__getitems__(list(range(low, high))))
        else:
            items = [dataset[row] for row in range(low, high)]
        if self._collate is not None:
            return self._collate(items)
        return stacked(items, low)


def loader_source(loader: DataLoader[Any]) -> BlockSource:
    """The source of the rows of a data loader.

    The rows of a map-style dataset are read by their numbers, in an order that the fit draws from
    its own seed; those of another dataset come as the loader gives them.

    Raises:
        ValueError: if the loader draws rows with other probabilities, or a part of them.
    """
    dataset = loader.dataset
    own_collate = loader.collate_fn is not default_collate
    collate = loader.collate_fn if own_collate else None
    batches: Any = loader.batch_sampler
    if isinstance(dataset, IterableDataset) or batches is None:
        source: BlockSource = _iterable(lambda: _batches(loader))
        source.batch_size, source.drop_last = loader.batch_size, bool(loader.drop_last)
        return source
    rows, shuffled = _sampled(loader)
    source = DatasetSource(rows, collate)
    source.shuffled = shuffled
    source.batch_size, source.drop_last = batches.batch_size, batches.drop_last
    return source


def dataset_source(dataset: Dataset[Any]) -> BlockSource:
    """The source of the rows of a dataset."""
    if not isinstance(dataset, IterableDataset):
        return DatasetSource(dataset)
    return _iterable(lambda: _item_batches(dataset))


def _sampled(loader: DataLoader[Any]) -> tuple[Dataset[Any], bool]:
    # The dataset of the rows that the loader draws, and whether it shuffles them.
    batches: Any = loader.batch_sampler
    found: Any = batches
    if type(batches) is BatchSampler:
        sampler: Any = batches.sampler
        found = sampler
        if type(sampler) is SequentialSampler:
            return loader.dataset, False
        whole = type(sampler) is RandomSampler and not sampler.replacement
        sized: Any = loader.dataset
        if whole and sampler.num_samples == len(sized):
            return loader.dataset, True
        if type(sampler) is SubsetRandomSampler:
            return Subset(loader.dataset, list(sampler.indices)), True
    raise ValueError(
        f"x is a DataLoader with a {type(found).__name__}, which does not draw each row once per "
        "epoch, so that the objective would not be that of the data. Pass its dataset instead "
        "(loader.dataset), or a torch.utils.data.Subset of it; the fit shuffles the rows from "
        "its own seed"
    )


def _iterable(start: Callable[[], Iterator[Any]]) -> IterableSource:
    has_labels = False

    def blocks() -> Iterator[Tensor]:
        nonlocal has_labels
        low, width = 0, None
        for batch in start():
            rows, labelled = rows_of_batch(batch, low, width)
            has_labels = has_labels or labelled
            low, width = low + len(rows), rows.shape[1]
            yield rows

    source = IterableSource(blocks)
    source.has_labels = has_labels
    return source


def _batches(loader: DataLoader[Any]) -> Iterator[Any]:
    yield from loader


def _item_batches(dataset: IterableDataset[Any]) -> Iterator[Any]:
    items, low = iter(dataset), 0
    while part := list(islice(items, ROWS_AT_ONCE)):
        yield stacked(part, low)
        low += len(part)


def rows_of_batch(batch: Any, low: int, width: int | None) -> tuple[Tensor, bool]:
    """The rows of a batch with NaN where a value is missing, and whether labels came with them.

    Args:
        batch: rows, (rows, labels) or (rows, mask).
        low: the number of the first row.
        width: the number of columns of the rows before them.

    Raises:
        TypeError: if it is none of these.
    """
    second = None
    if isinstance(batch, list | tuple):
        if len(batch) not in (1, 2):
            raise TypeError(f"x must yield {ITEMS}; it yields {len(batch)} parts")
        batch, second = batch[0], (batch[1] if len(batch) == 2 else None)
    if not isinstance(batch, Tensor | np.ndarray):
        raise TypeError(
            f"x must yield {ITEMS} as arrays or tensors; it yields {_kind(batch)}. A collate_fn "
            "of a DataLoader, or a Dataset around this one, can convert it"
        )
    if batch.ndim < 2:
        raise ValueError(
            f"x must yield batches of rows, (B, D); it yields an array of shape "
            f"{tuple(batch.shape)}"
        )
    shape = tuple(batch.shape)
    is_mask = "bool" in str(getattr(second, "dtype", "")) and tuple(second.shape) == shape  # pyright: ignore[reportOptionalMemberAccess]
    mask = second.reshape(len(batch), -1) if is_mask else None  # pyright: ignore[reportOptionalMemberAccess]
    rows = as_block(batch.reshape(len(batch), -1), low, mask=mask, width=width)
    return rows, second is not None and not is_mask


def stacked(items: Sequence[Any], low: int) -> Any:
    """Items of a dataset as a batch.

    Args:
        items: rows, (row, label) or (row, mask).
        low: the number of the first of them.

    Raises:
        TypeError: if they are none of these.
        ValueError: if the rows have different shapes.
    """
    pairs = [_row_and_other(item) for item in items]
    rows = [_as_array(row) for row, _ in pairs]
    for place, row in enumerate(rows):
        if row.shape != rows[0].shape:
            raise ValueError(
                f"the rows of x must have the same shape; row {low + place} has "
                f"{tuple(row.shape)}, row {low} has {tuple(rows[0].shape)}"
            )
    batch = torch.stack(rows) if isinstance(rows[0], Tensor) else np.stack(rows)
    batch = batch.reshape(len(rows), -1)
    others = [other for _, other in pairs]
    if all(other is None for other in others):
        return batch
    masks = [as_host_array(other) for other in others]
    if all(m.dtype == bool and m.shape == tuple(rows[0].shape) for m in masks):
        return batch, np.stack(masks).reshape(len(rows), -1)
    return batch, others


def _row_and_other(item: Any) -> tuple[Any, Any]:
    if not isinstance(item, list | tuple) or all(isinstance(part, int | float) for part in item):
        return item, None
    if len(item) not in (1, 2):
        raise TypeError(f"x must yield {ITEMS}; its items have {len(item)} parts")
    return item[0], (item[1] if len(item) == 2 else None)


def _as_array(row: Any) -> Any:
    if isinstance(row, Tensor):
        return row.detach().cpu()
    array = np.asarray(row)
    known = isinstance(row, np.ndarray | np.generic | list | tuple | int | float)
    if not known or not is_real(array.dtype):
        raise TypeError(
            f"x must yield {ITEMS} of numbers; it yields {_kind(row)}. Convert it in the dataset, "
            "as torchvision.transforms.ToTensor() does with images"
        )
    return array


def _kind(value: Any) -> str:
    shown = f"{value!r:.40}" if isinstance(value, str | int | float) else ""
    return f"{type(value).__name__} {shown}".strip()
