"""Data on a plane by several pairs with two latent dimensions: what each map keeps of them."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from ppl_vae.core.program import ProgramLike
from ppl_vae.core.results import Result
from ppl_vae.core.text_table import render
from ppl_vae.core.validation import ArrayLike, as_matrix, check_int
from ppl_vae.evaluation.prediction.predictive import encode, reconstruct


@dataclass(frozen=True)
class Map(Result):
    """Where a pair puts data on its plane.

    Attributes:
        name: of the pair.
        codes: of the held-out rows, the means of q(z | x), (N, 2).
        error: |x - G(f(x))|^2 of each held-out row, in squared units of x, (N,).
        right: whether the classes of the nearest training rows on the plane name each held-out
            row's own, 0 or 1, (N,).
    """

    name: str
    codes: Float[Tensor, "N 2"]
    error: Float[Tensor, " N"]
    right: Float[Tensor, " N"]

    @property
    def mean_error(self) -> tuple[float, float]:
        """Of the rows, and its standard error."""
        return _mean(self.error)

    @property
    def accuracy(self) -> tuple[float, float]:
        """The share of rows that their neighbours name rightly, and its standard error."""
        return _mean(self.right)


def _mean(values: Float[Tensor, " N"]) -> tuple[float, float]:
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


@dataclass(frozen=True, repr=False)
class Embeddings(Result):
    """Maps of the same rows.

    Attributes:
        maps: in the order given.
        labels: the class of each held-out row.
        neighbours: that name a row's class.
    """

    maps: tuple[Map, ...]
    labels: tuple[Any, ...]
    neighbours: int

    def to_frame(self) -> pd.DataFrame:
        """One row a map: mean error and accuracy, each with its standard error."""
        rows = [(*each.mean_error, *each.accuracy) for each in self.maps]
        columns = ["error", "error_se", "accuracy", "accuracy_se"]
        names = pd.Index([each.name for each in self.maps], name="map")
        return pd.DataFrame(rows, columns=columns, index=names)

    def __repr__(self) -> str:
        head = ("", "squared error", f"rightly named by {self.neighbours} neighbours, %")
        rows = [
            (
                each.name,
                "{:.3f} ± {:.3f}".format(*each.mean_error),
                "{:.1f} ± {:.1f}".format(*(100 * value for value in each.accuracy)),
            )
            for each in self.maps
        ]
        count = (
            f"{len(self.labels)} held-out rows, ± standard error; squared error: |x - its mean "
            "given its place|^2, in squared units of x"
        )
        return "\n".join([count, render(rows, head)])


def compare_embeddings(
    pairs: Mapping[str, tuple[ProgramLike, ProgramLike]],
    x: ArrayLike,
    y: Iterable[Any],
    x_test: ArrayLike,
    y_test: Iterable[Any],
    *,
    neighbours: int = 5,
) -> Embeddings:
    """Maps of held-out rows by fitted pairs with two latent dimensions, and two numbers for each.

    The error says how much of a row its place on the plane keeps; the accuracy, whether classes
    that the pairs never saw stand apart on it. The mean of x is taken at the mean of q(z | x).

    Args:
        pairs: model and guide by name, fitted to x, each under the contract; a point for a guide
            will do.
        x, y: training rows, (N, D), and their classes.
        x_test, y_test: held-out rows, and theirs.
        neighbours: training rows that name a held-out row's class, by the majority.

    Raises:
        ValueError: if there are no pairs, a pair has not two latent dimensions, or labels are not
            as many as rows.
        NotImplementedError: if the distribution of a guide's site has no mean in closed form.
    """
    if not pairs:
        raise ValueError("give at least one pair")
    check_int("neighbours", neighbours)
    x, x_test = as_matrix(x), as_matrix(x_test, name="x_test")
    classes, labels = np.asarray(list(y)), np.asarray(list(y_test))
    if (len(classes), len(labels)) != (len(x), len(x_test)):
        raise ValueError(
            f"y and y_test must have {len(x)} and {len(x_test)} entries, one per row; they have "
            f"{len(classes)} and {len(labels)}"
        )
    judge = KNeighborsClassifier(neighbours)
    maps = tuple(
        _look(name, pair, x, classes, x_test, labels, judge) for name, pair in pairs.items()
    )
    return Embeddings(maps, tuple(labels.tolist()), neighbours)


def _look(
    name: str,
    pair: tuple[ProgramLike, ProgramLike],
    x: Tensor,
    classes: np.ndarray,
    x_test: Tensor,
    labels: np.ndarray,
    judge: KNeighborsClassifier,
) -> Map:
    places, codes = (encode(*pair, rows).double().cpu() for rows in (x, x_test))
    if codes.shape[1] != 2:
        raise ValueError(f"{name} has {codes.shape[1]} latent dimensions; a map has two")
    back = reconstruct(*pair, x_test).double().cpu()
    error = (x_test.double().cpu() - back).square().nansum(1)
    guess = judge.fit(places.numpy(), classes).predict(codes.numpy())
    return Map(name, codes, error, torch.as_tensor(guess == labels).double())
