"""Which covariances of a linear-Gaussian model the pattern of observed entries can determine.

Rows and columns are the two sides of a bipartite graph, in which an observed entry joins its row
and its column. Suppose that removing c columns and r rows separates columns A from columns B.
Without those r rows, each row is observed in A and C or in B and C, with C the c columns, so that
the likelihood depends on the covariance of x through its blocks on A and C, and on B and C, only.
With W_C the loadings of C, W_A may be replaced by W_A Q for any orthogonal Q with W_C Q = W_C
without changing either block. If c < K there is such a Q other than I, at least a reflection, and
W_A Q W_B', the covariance of A and B, depends on Q: a fit ends with the one that its initial
values lead to.

A removed row has one z in common with both sides, which determines at most one direction of Q, up
to the noise of one draw. The covariance of two columns is therefore called undetermined if c < K
and c + r < K + 1 for some separating set: K common columns are required, or K + 1 common columns
and rows. (K rows alone could be fitted exactly, which leaves no information on the noise.) The
condition is necessary for the covariance to be determined, and not sufficient.

References:
    Singer, Cucuringu: Uniqueness of low-rank matrix completion by rigidity theory (2010).
    Menger: Zur allgemeinen Kurventheorie (1927), on separating sets and disjoint paths.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import breadth_first_order, maximum_flow
from torch import Tensor

from ppl_vae.data.sources.row_blocks import RowBlocks

NUM_HUBS = 32
"""The number of most often observed columns whose links are checked first (at least 4 K)."""
MAX_COLUMNS_NAMED = 6
"""The largest number of columns on each side that a message names."""


def undetermined_pairs(blocks: RowBlocks, latent_dim: int) -> Int[Tensor, "P 2"] | None:
    """The pairs of columns whose covariance the observed entries cannot determine.

    Columns that have more than K rows in common are linked. The table is read twice, to find the
    links to the columns observed most often. Two more passes, D^2 counts and some maximum flows
    are needed only if these do not link all columns.

    Args:
        blocks: the table that a model is fitted to; it is read several times.
        latent_dim: K.

    Returns:
        Sorted pairs (i, j) with i < j; None if there are none.
    """
    frequency = _frequencies(blocks)
    hubs = frequency.topk(min(len(frequency), max(NUM_HUBS, 4 * latent_dim))).indices
    shared = (_joint_counts(blocks, hubs) > latent_dim).sum(1)
    if bool((2 * shared >= len(hubs) + latent_dim).all()):
        return None  # any two columns are linked to K hubs in common
    columns = torch.arange(len(frequency), device=frequency.device)
    linked = (_joint_counts(blocks, columns) > latent_dim).cpu().numpy()
    linked = _transitive_links(linked, latent_dim)
    if linked.all():
        return None
    patterns, repeats = _distinct_patterns(blocks)
    separated = _separated_pairs(ObservationGraph(patterns, repeats, latent_dim), linked)
    pairs = np.argwhere(np.triu(separated, 1))
    return torch.from_numpy(pairs) if len(pairs) else None


def undetermined_entries(
    observed: Bool[Tensor, "N D"], pairs: Int[Tensor, "P 2"] | None
) -> Bool[Tensor, "N D"]:
    """The missing entries whose distribution given their row depends on undetermined covariances.

    Args:
        observed: which entries are observed.
        pairs: the result of :func:`undetermined_pairs`.
    """
    if pairs is None:
        return torch.zeros_like(observed)
    width = observed.shape[1]
    undetermined = torch.zeros(width, width, device=observed.device)
    first, second = pairs.T
    undetermined[first, second] = undetermined[second, first] = 1.0
    return (observed.to(undetermined) @ undetermined > 0) & ~observed


def describe_undetermined(
    pairs: Int[Tensor, "P 2"] | None, latent_dim: int, names: Sequence[str] | None = None
) -> tuple[str, ...]:
    """A note on undetermined pairs; empty if there are none.

    Args:
        pairs: the result of :func:`undetermined_pairs`.
        latent_dim: K.
        names: the names of the columns; by default their numbers.
    """
    if pairs is None or not len(pairs):
        return ()
    groups = [
        f"{_format_columns(columns, names)} with {_format_columns(others, names)}"
        for columns, others in _column_groups(pairs)
    ]
    more = f", and {len(groups) - 3} more groups" if len(groups) > 3 else ""
    return (
        f"the covariances of columns {'; of '.join(groups[:3])}{more} are not determined by the "
        "observed entries: too few rows and columns observed together connect these columns for "
        f"latent_dim={latent_dim} ({latent_dim} common columns are needed, or {latent_dim + 1} "
        "common columns and rows). These covariances come from the initial values of the fit, and "
        "so do values imputed from one group to the other; they have no standard deviation",
    )


def _column_groups(pairs: Int[Tensor, "P 2"]) -> list[tuple[list[int], list[int]]]:
    # Columns with the same partners are one group; each pair of groups is listed once.
    partners: dict[int, set[int]] = {}
    for first, second in torch.cat([pairs, pairs.flip(1)]).tolist():
        partners.setdefault(first, set()).add(second)
    groups: dict[frozenset[int], list[int]] = {}
    for column in sorted(partners):
        groups.setdefault(frozenset(partners[column]), []).append(column)
    return [
        (columns, sorted(others))
        for others, columns in groups.items()
        if min(columns) < min(others) or not any(groups.get(frozenset(columns), ()))
    ]


def _format_columns(columns: Sequence[int], names: Sequence[str] | None) -> str:
    shown = [str(c) if names is None else names[c] for c in columns[:MAX_COLUMNS_NAMED]]
    more = f", ... ({len(columns)} in all)" if len(columns) > MAX_COLUMNS_NAMED else ""
    return f"({', '.join(shown)}{more})"


def _observed_masks(blocks: RowBlocks) -> Iterator[Bool[Tensor, "B D"]]:
    if blocks.processes.size > 1:  # this one may have no rows
        yield torch.ones(0, blocks.width or 0, dtype=torch.bool, device=blocks.device)
    for block in blocks.read():
        complete = torch.ones_like(block.values, dtype=torch.bool)
        yield complete if block.observed is None else block.observed


def _frequencies(blocks: RowBlocks) -> Int[Tensor, " D"]:
    # The number of rows in which each column is observed.
    total = torch.stack([rows.sum(0) for rows in _observed_masks(blocks)]).sum(0)
    return blocks.processes.sum(total)


def _joint_counts(blocks: RowBlocks, hubs: Int[Tensor, " H"]) -> Float[Tensor, "D H"]:
    # The number of rows in which both columns are observed.
    total: Tensor | None = None
    for mask in _observed_masks(blocks):
        values = mask.double()
        counts = values.mT @ values[:, hubs]
        total = counts if total is None else total + counts
    assert total is not None
    return blocks.processes.sum(total)


def _distinct_patterns(
    blocks: RowBlocks,
) -> tuple[Bool[np.ndarray, "U D"], Int[np.ndarray, " U"]]:
    # The distinct rows of the mask, and the number of times that each occurs.
    packed, width = [], 0
    for mask in _observed_masks(blocks):
        width = mask.shape[1]
        packed.append(np.packbits(mask.cpu().numpy(), axis=1))
    distinct, repeats = np.unique(np.concatenate(packed), axis=0, return_counts=True)
    if (processes := blocks.processes).size > 1:
        parts = [processes.gather_rows(torch.from_numpy(part)) for part in (distinct, repeats)]
        distinct, inverse = np.unique(parts[0].numpy(), axis=0, return_inverse=True)
        repeats = np.bincount(inverse.reshape(-1), weights=parts[1].numpy()).astype(int)
    return np.unpackbits(distinct, axis=1, count=width).astype(bool), repeats


def _transitive_links(linked: Bool[np.ndarray, "D D"], latent_dim: int) -> Bool[np.ndarray, "D D"]:
    # A separating set that is too small has fewer than K columns, so it cannot separate two
    # columns that are both linked to the same K others.
    while not linked.all():
        links = linked.astype(np.float32)
        np.fill_diagonal(links, 0)
        more = linked | (links @ links >= latent_dim)
        if (more == linked).all():
            break
        linked = more
    return linked


def _separated_pairs(
    graph: "ObservationGraph", linked: Bool[np.ndarray, "D D"]
) -> Bool[np.ndarray, "D D"]:
    # Decides every pair of columns that earlier pairs have not decided.
    separated = np.zeros_like(linked)
    for last in range(1, len(linked)):
        for first in range(last):
            if linked[first, last] or separated[first, last]:
                continue
            sides = graph.separate(first, last)
            if sides is None:
                linked[first, last] = linked[last, first] = True
                linked = _transitive_links(linked, graph.latent_dim)
            else:
                separated |= np.outer(*sides) | np.outer(*sides[::-1])
    return separated


class ObservationGraph:
    """The bipartite graph of rows and columns, in which minimum separating sets are computed.

    A column has weight K + 1 and a row weight K; a separating set is too small to determine a
    covariance if its weight is below K (K + 1).

    Args:
        patterns: the distinct rows of the mask, (U, D).
        repeats: the number of times that each occurs, (U,).
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
        nodes = self.width + num_patterns  # edges enter node i at i and leave it at i + nodes
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

    def separate(
        self, first: int, second: int
    ) -> tuple[Bool[np.ndarray, " D"], Bool[np.ndarray, " D"]] | None:
        """The columns on each side of the minimum separating set; None if it is large enough.

        The columns of the set itself are on neither side.
        """
        size, source = 2 * self._nodes, first + self._nodes
        graph = csr_matrix((self._weights, (self._tails, self._heads)), shape=(size, size))
        flow = maximum_flow(graph, source, second)
        if flow.flow_value >= self._enough:
            return None
        residual = graph - flow.flow
        residual.data = np.maximum(residual.data, 0)
        residual.eliminate_zeros()
        reached = np.zeros(size, dtype=bool)
        reached[breadth_first_order(residual, source, return_predecessors=False)] = True
        entered, left = reached[: self.width], reached[self._nodes : self._nodes + self.width]
        near, far = left.copy(), ~entered & ~left
        near[first], far[first] = True, False
        return near, far
