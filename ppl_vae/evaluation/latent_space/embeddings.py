"""Two-dimensional embeddings of the same data by several pairs, with errors and accuracies."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.arrays.schema import TableSchema
from ppl_vae.core.program import ProgramLike
from ppl_vae.core.results import Result
from ppl_vae.core.stats import mean_and_error
from ppl_vae.core.text import counted
from ppl_vae.core.text_table import render
from ppl_vae.core.validation import ArrayLike, as_matrix, check_int
from ppl_vae.evaluation.prediction.predictive import encode, reconstruct

if TYPE_CHECKING:
    import pandas
    import sklearn.neighbors


@dataclass(frozen=True)
class Embedding(Result):
    """The embedding of held-out rows by one pair.

    Attributes:
        name: the name of the pair.
        codes: the means of q(z | x) of the held-out rows, (N, 2).
        error: |x - G(f(x))|^2 of each held-out row, in squared units of x, (N,).
        correct: whether the nearest training rows in the plane predict the class of each held-out
            row, 0 or 1, (N,).
    """

    name: str
    codes: Float[Tensor, "N 2"]
    error: Float[Tensor, " N"]
    correct: Float[Tensor, " N"]

    @property
    def mean_squared_error(self) -> tuple[float, float]:
        """The mean squared error over the rows, and its standard error."""
        return mean_and_error(self.error)

    @property
    def accuracy(self) -> tuple[float, float]:
        """The share of rows whose neighbours predict the class, and its standard error."""
        return mean_and_error(self.correct)


@dataclass(frozen=True, repr=False)
class Embeddings(Result):
    """Embeddings of the same held-out rows by several pairs.

    Attributes:
        embeddings: one per pair, in the order given.
        labels: the class of each held-out row.
        neighbours: the number of training rows that predict a class.
    """

    embeddings: tuple[Embedding, ...]
    labels: tuple[Any, ...]
    neighbours: int

    def to_frame(self) -> "pandas.DataFrame":
        """One row per embedding: mean error and accuracy, each with its standard error."""
        import pandas as pd

        rows = [(*each.mean_squared_error, *each.accuracy) for each in self.embeddings]
        columns = ["error", "error_se", "accuracy", "accuracy_se"]
        names = pd.Index([each.name for each in self.embeddings], name="embedding")
        return pd.DataFrame(rows, columns=columns, index=names)

    def __repr__(self) -> str:
        head = ("", "squared error", f"accuracy of {self.neighbours} nearest neighbours, %")
        rows = [
            (
                each.name,
                "{:.3f} ± {:.3f}".format(*each.mean_squared_error),
                "{:.1f} ± {:.1f}".format(*(100 * value for value in each.accuracy)),
            )
            for each in self.embeddings
        ]
        count = (
            f"{counted(len(self.labels), 'held-out row')}, ± one standard error; squared error: "
            "|x - E[x | z]|^2 at the mean z of q(z | x), in squared units of x"
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
    """Embed held-out rows with fitted pairs that have two latent dimensions, and compare them.

    The squared error measures the information that is lost in the plane; the accuracy measures
    whether the plane separates classes that were not used in the fits. The mean of x is that given
    the mean of q(z | x).

    Args:
        pairs: model and guide by name, fitted to x, each under the contract; a Delta guide is
            enough.
        x, y: training rows, (N, D), and their classes.
        x_test, y_test: held-out rows and their classes.
        neighbours: number of nearest training rows whose majority predicts a held-out row's class.

    Raises:
        ValueError: if there are no pairs, if a pair does not have two latent dimensions, or if the
            number of labels differs from that of rows.
        NotImplementedError: if the distribution of a guide's site has no mean in closed form.
    """
    from sklearn.neighbors import KNeighborsClassifier

    if not pairs:
        raise ValueError("give at least one pair")
    check_int("neighbours", neighbours)
    x_test = as_matrix(x_test, name="x_test", schema=TableSchema.of(x))
    x = as_matrix(x)
    classes, labels = np.asarray(list(y)), np.asarray(list(y_test))
    if (len(classes), len(labels)) != (len(x), len(x_test)):
        raise ValueError(
            f"y and y_test must have {len(x)} and {len(x_test)} entries, one per row; they have "
            f"{len(classes)} and {len(labels)}"
        )
    classifier = KNeighborsClassifier(neighbours)
    embeddings = tuple(
        _embed(name, pair, x, classes, x_test, labels, classifier) for name, pair in pairs.items()
    )
    return Embeddings(embeddings, tuple(labels.tolist()), neighbours)


def _embed(
    name: str,
    pair: tuple[ProgramLike, ProgramLike],
    x: Tensor,
    classes: np.ndarray,
    x_test: Tensor,
    labels: np.ndarray,
    classifier: "sklearn.neighbors.KNeighborsClassifier",
) -> Embedding:
    train_codes, codes = (encode(*pair, rows).double().cpu() for rows in (x, x_test))
    if codes.shape[1] != 2:
        raise ValueError(f"{name} has {codes.shape[1]} latent dimensions; an embedding has two")
    reconstruction = reconstruct(*pair, x_test).double().cpu()
    error = (x_test.double().cpu() - reconstruction).square().nansum(1)
    predicted = classifier.fit(train_codes.numpy(force=True), classes).predict(
        codes.numpy(force=True)
    )
    return Embedding(name, codes, error, torch.as_tensor(predicted == labels).double())
