"""Which covariances a linear-Gaussian model can know, given which columns are observed together.

Rows and columns are the two sides of a graph; an observed cell joins its row and its column. Let
the removal of c columns and r rows leave columns A and B in different parts. Without those rows
each row is observed in A and C or in B and C, with C the c columns, so that the likelihood knows
the covariance of x through its blocks on A and C, and on B and C, alone. With w_C the loadings of
C, W_A may be replaced by W_A Q for any orthogonal Q with W_C Q = W_C without a change of either
block. If c < K there is such a Q other than I, at the least a reflection, and W_A Q W_B', the
covariance of A and B, is whatever Q makes it: which one a fit ends with is its start's choice.

A row taken away had one z in common with both sides, which fixes no more than one direction of Q,
and that only up to the noise of one draw. The covariance of two columns is therefore called
undetermined if c < K and c + r < K + 1 for some set that separates them: K columns in common are
asked for, or K + 1 columns and rows. (K rows alone would be met exactly, with nothing to tell
noise.) This is necessary for the covariance to be known, and not sufficient.

References:
    Singer, Cucuringu: Uniqueness of low-rank matrix completion by rigidity theory (2010).
    Menger: Zur allgemeinen Kurventheorie (1927), of separating sets and disjoint paths.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import breadth_first_order, maximum_flow
from torch import Tensor

from ppl_vae.data.row_blocks import RowBlocks

NUM_HUBS = 32
"""So many of the columns observed most often are tried first, or 4 K."""
MOST_NAMED = 6
"""So many columns of each side a message names."""


def undetermined_pairs(blocks: RowBlocks, latent_dim: int) -> Int[Tensor, "P 2"] | None:
    """The pairs of columns whose covariance the observed cells cannot determine.

    Columns that have more than K rows in common are linked. The table is read twice, for the
    links to the columns observed most often; two more readings, D^2 numbers and some maximum
    flows are needed only where these do not link everything.

    Args:
        blocks: the table that a model is fitted to; readable as often as asked.
        latent_dim: K.

    Returns:
        Pairs (i, j), i < j, in order; None if there are none.
    """
    often = torch.stack([rows.sum(0) for rows in _observed(blocks)]).sum(0)
    hubs = often.topk(min(len(often), max(NUM_HUBS, 4 * latent_dim))).indices
    shared = (_counts(blocks, hubs) > latent_dim).sum(1)
    if bool((2 * shared >= len(hubs) + latent_dim).all()):
        return None  # any two columns are linked to K hubs in common
    everything = torch.arange(len(often), device=often.device)
    linked = _extended((_counts(blocks, everything) > latent_dim).cpu().numpy(), latent_dim)
    if linked.all():
        return None
    patterns, repeats = _patterns(blocks)
    apart = _apart(Cells(patterns, repeats, latent_dim), linked)
    pairs = np.argwhere(np.triu(apart, 1))
    return torch.from_numpy(pairs) if len(pairs) else None


def undetermined_cells(
    seen: Bool[Tensor, "N D"], pairs: Int[Tensor, "P 2"] | None
) -> Bool[Tensor, "N D"]:
    """The missing cells whose distribution given their row rests on an undetermined covariance.

    Args:
        seen: which cells are observed.
        pairs: as :func:`undetermined_pairs` gives them.
    """
    if pairs is None:
        return torch.zeros_like(seen)
    apart = torch.zeros(seen.shape[1], seen.shape[1], device=seen.device)
    apart[pairs[:, 0], pairs[:, 1]] = apart[pairs[:, 1], pairs[:, 0]] = 1.0
    return (seen.to(apart) @ apart > 0) & ~seen


def described(
    pairs: Int[Tensor, "P 2"] | None, latent_dim: int, names: Sequence[str] | None = None
) -> tuple[str, ...]:
    """What a person should know of undetermined pairs: one sentence, or none.

    Args:
        pairs: as :func:`undetermined_pairs` gives them.
        latent_dim: K.
        names: of the columns; by default their numbers.
    """
    if pairs is None or not len(pairs):
        return ()
    partners: dict[int, set[int]] = {}
    for first, second in torch.cat([pairs, pairs.flip(1)]).tolist():
        partners.setdefault(first, set()).add(second)
    groups: dict[frozenset[int], list[int]] = {}
    for column in sorted(partners):
        groups.setdefault(frozenset(partners[column]), []).append(column)
    said: list[str] = []
    for others, columns in groups.items():
        if min(columns) < min(others) or not any(groups.get(frozenset(columns), ())):
            said.append(f"{_listed(columns, names)} with {_listed(sorted(others), names)}")
    more = f", and {len(said) - 3} more groups" if len(said) > 3 else ""
    return (
        f"the covariances of columns {'; of '.join(said[:3])}{more} are not determined by what "
        "was observed: these columns are connected by too few rows and columns observed together "
        f"for latent_dim={latent_dim} ({latent_dim} columns in common are needed, or "
        f"{latent_dim + 1} columns and rows). They come from the start of the fit, and so would "
        "what is imputed from one to the other: no standard deviation is given there",
    )


def _listed(columns: Sequence[int], names: Sequence[str] | None) -> str:
    shown = [str(column) if names is None else names[column] for column in columns[:MOST_NAMED]]
    more = f", ... ({len(columns)} in all)" if len(columns) > MOST_NAMED else ""
    return f"({', '.join(shown)}{more})"


def _observed(blocks: RowBlocks) -> Iterator[Bool[Tensor, "B D"]]:
    for block in blocks.read():
        everything = torch.ones_like(block.values, dtype=torch.bool)
        yield everything if block.observed is None else block.observed


def _counts(blocks: RowBlocks, hubs: Int[Tensor, " H"]) -> Float[Tensor, "D H"]:
    # How many rows have both columns.
    total: Tensor | None = None
    for rows in _observed(blocks):
        values = rows.double()
        together = values.mT @ values[:, hubs]
        total = together if total is None else total + together
    assert total is not None
    return total


def _patterns(blocks: RowBlocks) -> tuple[Bool[np.ndarray, "U D"], Int[np.ndarray, " U"]]:
    # The distinct rows of the mask, and how often each is there.
    packed, width = [], 0
    for rows in _observed(blocks):
        width = rows.shape[1]
        packed.append(np.packbits(rows.cpu().numpy(), axis=1))
    distinct, repeats = np.unique(np.concatenate(packed), axis=0, return_counts=True)
    return np.unpackbits(distinct, axis=1, count=width).astype(bool), repeats


def _extended(linked: Bool[np.ndarray, "D D"], latent_dim: int) -> Bool[np.ndarray, "D D"]:
    # A set too small to separate has fewer than K columns; so two columns that are each linked to
    # the same K others cannot be separated by it.
    while not linked.all():
        links = linked.astype(np.float32)
        np.fill_diagonal(links, 0)
        more = linked | (links @ links >= latent_dim)
        if (more == linked).all():
            break
        linked = more
    return linked


def _apart(cells: "Cells", linked: Bool[np.ndarray, "D D"]) -> Bool[np.ndarray, "D D"]:
    # Every pair that is neither known to be linked nor apart is tried, those before it first.
    apart = np.zeros_like(linked)
    for last in range(1, len(linked)):
        for first in range(last):
            if linked[first, last] or apart[first, last]:
                continue
            sides = cells.separated(first, last)
            if sides is None:
                linked[first, last] = linked[last, first] = True
                linked = _extended(linked, cells.latent_dim)
            else:
                apart |= np.outer(*sides) | np.outer(*sides[::-1])
    return apart


class Cells:
    """The graph of rows and columns, in which sets that separate columns are sought.

    A column weighs K + 1, a row K: a set of rows and columns is too small to be relied on if it
    weighs less than K (K + 1).

    Args:
        patterns: the distinct rows of the mask, (U, D).
        repeats: how often each is there, (U,).
        latent_dim: K.
    """

    def __init__(
        self,
        patterns: Bool[np.ndarray, "U D"],
        repeats: Int[np.ndarray, " U"],
        latent_dim: int,
    ) -> None:
        self.latent_dim, (num_patterns, self.width) = latent_dim, patterns.shape
        self._enough = latent_dim * (latent_dim + 1)
        nodes = self.width + num_patterns  # each is entered at its number, and left at + nodes
        rows, columns = patterns.nonzero()
        within = np.arange(nodes)
        self._tails = np.concatenate([within, columns + nodes, rows + self.width + nodes])
        self._heads = np.concatenate([within + nodes, rows + self.width, columns])
        weights = np.minimum(repeats, latent_dim + 1) * latent_dim
        self._weights = np.concatenate(
            [
                np.full(self.width, latent_dim + 1),
                weights,
                np.full(2 * len(rows), self._enough),
            ]
        ).astype(np.int32)
        self._nodes = nodes

    def separated(
        self, first: int, second: int
    ) -> tuple[Bool[np.ndarray, " D"], Bool[np.ndarray, " D"]] | None:
        """The columns on either side of the lightest set between two; None if it is large enough.

        The columns of the set itself are on neither side.
        """
        size = 2 * self._nodes
        graph = csr_matrix((self._weights, (self._tails, self._heads)), shape=(size, size))
        flow = maximum_flow(graph, first + self._nodes, second)
        if flow.flow_value >= self._enough:
            return None
        left = graph - flow.flow
        left.data = np.maximum(left.data, 0)
        left.eliminate_zeros()
        reached = np.zeros(size, dtype=bool)
        start = first + self._nodes
        reached[breadth_first_order(left, start, return_predecessors=False)] = True
        entered, gone = reached[: self.width], reached[self._nodes : self._nodes + self.width]
        near, far = gone.copy(), ~entered & ~gone
        near[first], far[first] = True, False
        return near, far
