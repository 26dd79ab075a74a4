"""Rows of data as a pair is run on them: values, missing values, and which rows of the data
set."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Rows of a data set, and everything that a program may be given with them.

    Attributes:
        x: the rows, (B, D), with zeros in place of missing values.
        mask: True where x is observed, (B, D); None where nothing is missing.
        index: the places of the rows in the data set, (B,); None for all of them in order.
        num_data: the number of rows of the data set; None where x is all of it.
        others: keyword arguments of the user's own, which are passed on unchanged.
    """

    x: Float[Tensor, "B D"]
    mask: Bool[Tensor, "B D"] | None = None
    index: Int[Tensor, " B"] | None = None
    num_data: int | None = None
    others: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, x: Float[Tensor, "B D"], keywords: Mapping[str, Any]) -> "Batch":
        """The batch with which a program is called as ``program(x, **keywords)``."""
        others = dict(keywords)
        named = {name: others.pop(name, None) for name in ("mask", "index", "num_data")}
        return cls(x, named["mask"], named["index"], named["num_data"], others)

    def __len__(self) -> int:
        return len(self.x)

    @property
    def device(self) -> torch.device:
        """The device of the rows."""
        return self.x.device

    @property
    def like(self) -> Float[Tensor, "0 D"]:
        """No rows, of the dtype and on the device of the batch."""
        return self.x[:0]

    @property
    def keywords(self) -> dict[str, Any]:
        """The keyword arguments of a program apart from x; those that are None are left out."""
        named = {"mask": self.mask, "index": self.index, "num_data": self.num_data}
        given = {name: value for name, value in named.items() if value is not None}
        return {**given, **self.others}

    @property
    def tensors(self) -> list[Tensor]:
        """x, then mask and index where they are given, as inputs of a captured function."""
        return [t for t in (self.x, self.mask, self.index) if t is not None]

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Batch":
        """The same batch with other :attr:`tensors` of the same shapes."""
        x, *given = tensors
        mask = None if self.mask is None else given.pop(0)
        index = None if self.index is None else given.pop(0)
        return replace(self, x=x, mask=mask, index=index)

    def rows(self, index: Int[Tensor, " B"]) -> "Batch":
        """These rows of the whole data set that the batch is; the batch itself for all in
        order."""
        # Indexing by a tensor would copy single numbers, and not whole rows.
        x = self.x.index_select(0, index)
        mask = None if self.mask is None else self.mask.index_select(0, index)
        everything = torch.arange(len(self), device=index.device)
        if len(index) == len(self) and torch.equal(index, everything):
            return replace(self, x=x, mask=mask)
        return replace(self, x=x, mask=mask, index=index, num_data=len(self))

    def split(self, index: Int[Tensor, " N"], size: int) -> Iterator["Batch"]:
        """The rows ``index`` of the whole data set in batches of at most ``size`` rows."""
        return (self.rows(part) for part in index.to(self.x.device).split(size))

    def repeated(self, times: int) -> "Batch":
        """Each row this many times, one copy of the batch after another."""
        index = torch.arange(len(self), device=self.x.device) if self.index is None else self.index
        mask = None if self.mask is None else self.mask.repeat(times, 1)
        num_data = len(self) if self.num_data is None else self.num_data
        index = index.repeat(times)
        return Batch(self.x.repeat(times, 1), mask, index, num_data, self.others)
