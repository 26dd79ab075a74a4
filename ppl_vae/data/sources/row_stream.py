"""Rows of a source for a pair: a few groups of blocks in memory, and the next one read ahead."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, NamedTuple, Self, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ppl_vae.core.arrays.digest import RowsDigest, describe_tensor
from ppl_vae.core.arrays.inputs import as_data_and_mask, check_named_support
from ppl_vae.core.batch import Batch
from ppl_vae.core.devices.device_memory import fits_on_device
from ppl_vae.core.introspection import placement
from ppl_vae.core.program import ProgramLike
from ppl_vae.core.state import kept_generators
from ppl_vae.core.text import counted
from ppl_vae.data.sources.block_source import PIECE_NUMBERS, BlockSource
from ppl_vae.data.sources.row_order import RowGroup, RowOrder

GROUPS_IN_MEMORY = 3
"""The number of groups in memory: that which is used, those before and after it."""
FIRST_ROWS = 4096
"""The number of rows from which the scales of the columns are judged."""


class _GroupData(NamedTuple):
    x: Float[Tensor, "R D"]
    mask: Bool[Tensor, "R D"] | None


class RowStream:
    """The rows of a source where a pair can use them, of which only some are in memory.

    It stands for the :class:`~ppl_vae.core.batch.Batch` of all rows. All rows are read once when
    it is made, to check them. On an accelerator, all rows are kept there if they fit into half of
    its free memory; otherwise groups of blocks are copied to it from pinned memory.

    Args:
        source: the rows.
        model, guide: the pair, for dtype, device, and whether the model takes ``mask``.
        name: the name of x in messages.
        allow_empty_rows: whether rows may have nothing observed.
        check: whether the model checks that the rows lie in its support.
        with_digest: whether checksums of the data are computed.

    Attributes:
        source: the rows.
        order: the order in which they are drawn.
        like: no rows, (0, D), of the dtype and on the device of the batches.
        is_missing: whether any value is missing; batches then have a mask.
        empty_rows: the numbers of rows with nothing observed.
        digests: descriptions of x and of the mask, if computed.

    Raises:
        ValueError: as :func:`ppl_vae.core.arrays.inputs.as_data_and_mask`.
    """

    def __init__(
        self,
        source: BlockSource,
        model: ProgramLike,
        guide: ProgramLike | None = None,
        *,
        name: str = "x",
        allow_empty_rows: bool = True,
        check: bool = True,
        with_digest: bool = False,
    ) -> None:
        self.source, self.order = source, RowOrder(source)
        place: dict[str, Any] = placement(*([model] if guide is None else [model, guide]))
        dtype = place.get("dtype", torch.get_default_dtype())
        self.like = torch.empty(0, source.width, dtype=dtype, device=place.get("device", "cpu"))
        self.is_missing, self.empty_rows = False, torch.empty(0, dtype=torch.int64)
        shape = (source.num_rows, source.width)
        self._digests = (RowsDigest(shape, dtype), RowsDigest(shape, torch.bool))
        self._pool = ThreadPoolExecutor(1) if source.threaded else None
        self._groups: dict[RowGroup, Future[_GroupData] | _GroupData | None] = {}
        self._in_order: dict[RowGroup, Future[_GroupData] | _GroupData | None] = {}
        self._name = name
        with kept_generators([]):
            self._survey(model, guide, check=check, with_digest=with_digest)
        self._check_rows_observed(allow_empty_rows)
        num_bytes = len(self) * source.width * (self.like.element_size() + self.is_missing)
        fits = fits_on_device(num_bytes, self.device)
        self.resident = bool(fits) and source.repeatable
        if self.resident:
            whole = self.order.whole()
            self._groups[whole] = self._load(whole)

    def __len__(self) -> int:
        return self.source.num_rows

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread that reads ahead, and release the rows in memory."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._groups, self._in_order = {}, {}

    @property
    def device(self) -> torch.device:
        """The device of the batches."""
        return self.like.device

    @property
    def digests(self) -> tuple[str, str | None]:
        """Descriptions of x and of the mask, with checksums; None for the mask of complete x."""
        x, mask = map(str, self._digests)
        return x, mask if self.is_missing else None

    def rows(self, index: Int[Tensor, " B"]) -> Batch:
        """These rows, on the device of the pair."""
        index = index.cpu()
        for known in (self._groups, self._in_order):
            for group in reversed(known):
                places = group.places(index)
                if bool((places >= 0).all()):
                    return self._batch(index, *self._taken(known, group, places))
        return self._batch(index, *self._assembled(index))

    def split(self, index: Int[Tensor, " N"], size: int) -> Iterator[Batch]:
        """The rows ``index`` in batches of at most ``size`` rows."""
        return (self.rows(part) for part in index.cpu().split(size))

    def first_rows(self) -> Batch:
        """The first rows, at most :data:`FIRST_ROWS`."""
        return self.rows(torch.arange(min(FIRST_ROWS, len(self))))

    def announce(self, group: RowGroup) -> None:
        """Read a group of rows ahead, since they will be drawn soon."""
        if self.resident:
            return
        self._in_order = {}
        _keep_last(self._groups, GROUPS_IN_MEMORY - 1)
        self._groups[group] = None if self._pool is None else self._submitted(group)

    def notes(self) -> tuple[str, ...]:
        """Notes on what of the source is not used."""
        return self.source.notes()

    def _batch(self, index: Tensor, x: Tensor, mask: Tensor | None) -> Batch:
        return Batch(x, mask, self._moved(index), len(self))

    def _taken(
        self, known: dict[RowGroup, Any], group: RowGroup, places: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        data, places = self._data(known, group), self._moved(places)
        return data.x[places], None if data.mask is None else data.mask[places]

    def _assembled(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        # Rows of several groups; those of none are read in the order of the source.
        x = self.like.new_empty(len(index), self.source.width)
        mask = torch.empty_like(x, dtype=torch.bool) if self.is_missing else None
        left = torch.arange(len(index))
        known = [(self._groups, group) for group in reversed(self._groups)]
        known += [(self._in_order, group) for group in reversed(self._in_order)]
        while len(left):
            if known:
                groups, group = known.pop(0)
            else:
                groups, group = self._in_order, self.order.group_of(int(index[left[0]]))
                _keep_last(groups, 1)
                groups[group] = None if self._pool is None else self._submitted(group)
            places = group.places(index[left])
            found = places >= 0
            if not bool(found.any()):
                continue
            values, observed = self._taken(groups, group, places[found])
            to = self._moved(left[found])
            x[to] = values
            if mask is not None and observed is not None:
                mask[to] = observed
            left = left[~found]
        return x, mask

    def _data(self, known: dict[RowGroup, Any], group: RowGroup) -> _GroupData:
        data = known[group]
        if isinstance(data, Future):
            data = data.result()
        elif data is None:
            keep = kept_generators([]) if self.source.repeatable else nullcontext()
            with keep:
                data = self._load(group)
        known[group] = data
        return data

    def _submitted(self, group: RowGroup) -> "Future[_GroupData]":
        assert self._pool is not None
        return self._pool.submit(self._load, group)

    def _load(self, group: RowGroup) -> _GroupData:
        x = self.like.new_empty(len(group), self.source.width)
        mask = torch.empty_like(x, dtype=torch.bool) if self.is_missing else None
        offset, size = 0, max(1, PIECE_NUMBERS // self.source.width)
        for start, stop in zip(group.starts.tolist(), group.stops.tolist(), strict=True):
            for low, high in self.source.blocks(start, stop, size):
                rows = slice(offset, offset + high - low)
                block = self.source.read(low, high).to(x.dtype)
                x[rows] = self._moved(block)
                if mask is not None:
                    mask[rows] = ~x[rows].isnan()
                    x[rows].masked_fill_(~mask[rows], 0.0)
                offset = rows.stop
                self.source.release()
        return _GroupData(x, mask)

    def _moved(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _survey(
        self, model: ProgramLike, guide: ProgramLike | None, *, check: bool, with_digest: bool
    ) -> None:
        # One pass over all rows, for what must be known before the first of them is used.
        size, empty = max(1, PIECE_NUMBERS // self.source.width), []
        for low, high in self.source.blocks(size=size):
            part = "" if high - low == len(self) else f" (its rows from {low} on)"
            x, mask = as_data_and_mask(
                self.source.read(low, high),
                model=model, guide=guide, name=self._name + part, allow_empty_rows=True,
            )  # fmt: skip
            if check:
                check_named_support(model, x, mask, self._name)
            if mask is not None:
                self.is_missing = True
                empty.append((~mask.any(1)).nonzero().flatten().cpu() + low)
            if with_digest:
                observed = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
                for digest, values in zip(self._digests, (x, observed), strict=True):
                    digest.add(values)
            self.source.release()
        if empty:
            self.empty_rows = torch.cat(empty)

    def _check_rows_observed(self, allow_empty_rows: bool) -> None:
        number = len(self.empty_rows)
        if number == len(self):
            raise ValueError(
                f"{self._name} has no observed value in any of its {counted(number, 'row')}"
            )
        if number and not allow_empty_rows:
            raise ValueError(
                f"{self._name} has rows with nothing observed: {self.empty_rows[:5].tolist()}; "
                "drop them"
            )


def _keep_last(groups: dict[RowGroup, Any], number: int) -> None:
    for group in list(groups)[: max(0, len(groups) - number)]:
        del groups[group]


Rows: TypeAlias = Batch | RowStream
"""All rows of a data set: in memory, or read when they are used."""


def describe_rows(rows: Rows) -> tuple[str, str | None]:
    """Descriptions of x and of the mask, if there is one, with their checksums."""
    if isinstance(rows, RowStream):
        return rows.digests
    return describe_tensor(rows.x), None if rows.mask is None else describe_tensor(rows.mask)
