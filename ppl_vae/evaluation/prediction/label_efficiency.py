"""What an encoder is worth where labels are few: fine-tuned, frozen, and from scratch."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy import stats
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from ppl_vae.core.results import Result
from ppl_vae.core.text_table import render
from ppl_vae.core.validation import ArrayLike, as_matrix, check_int, check_option
from ppl_vae.inference.svi.fit import fit_svi
from ppl_vae.likelihoods.discrete import Categorical
from ppl_vae.models.decoder_model import DecoderModel
from ppl_vae.models.supervised import SupervisedEncoder

NETWORKS = ("scratch", "fine-tuned", "frozen")
LOGISTIC = "logistic regression"
MEASURES = ("accuracy", "log_loss")
LEVEL = 0.95
HOLED = f"x has missing values, which {LOGISTIC} does not take; it was left out"


@dataclass(frozen=True)
class PairedDifference(Result):
    """A mean difference of pairs, and where Student's t says that it lies.

    Attributes:
        mean: of the differences.
        low, high: ends of the 95 % interval.
    """

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, differences: Float[Tensor, " S"]) -> "PairedDifference":
        """mean +- t_{S-1} sd / sqrt(S), with t the 97.5 % quantile of Student's distribution."""
        mean, number = float(differences.mean()), len(differences)
        quantile = float(stats.t.ppf((1 + LEVEL) / 2, number - 1))
        reach = quantile * float(differences.std()) / math.sqrt(number)
        return cls(mean, mean - reach, mean + reach)

    @property
    def sign(self) -> int:
        """1 or -1 where the interval has one sign, else 0: the two cannot be told apart."""
        return int(self.low > 0) - int(self.high < 0)


@dataclass(frozen=True, repr=False)
class LabelEfficiency(Result):
    """Classifiers from a few labels, each draw of labels scored on the same held-out rows.

    Intervals are over the draws of labels and of initial weights, given the pair and the held-out
    rows.

    Attributes:
        ways: ``"scratch"``, ``"fine-tuned"``, ``"frozen"``, ``"logistic regression"``.
        accuracy: the share of held-out rows whose class is the most probable, a way and a draw.
        log_loss: minus the mean of log p(y | x) over held-out rows, in nats per datum.
        seeds: of the draws.
        num_labels: labels in each.
        num_classes: C.
        num_test: held-out rows.
        notes: what else a person should know.
    """

    ways: tuple[str, ...]
    accuracy: Float[Tensor, "W S"]
    log_loss: Float[Tensor, "W S"]
    seeds: tuple[int, ...]
    num_labels: int
    num_classes: int
    num_test: int
    notes: tuple[str, ...] = ()

    def difference(
        self, way: str, other: str = "scratch", measure: str = "accuracy"
    ) -> PairedDifference:
        """One way less another, draw by draw.

        Args:
            way, other: two of the ways.
            measure: ``"accuracy"`` or ``"log_loss"``.

        Raises:
            ValueError: if there is no such way or measure.
        """
        values = getattr(self, check_option("measure", measure, MEASURES))
        places = [
            self.ways.index(check_option(name, wanted, self.ways))
            for name, wanted in (("way", way), ("other", other))
        ]
        return PairedDifference.of(values[places[0]] - values[places[1]])

    @property
    def verdict(self) -> str:
        """Whether fine-tuning or the same network from scratch is right more often; who most."""
        found, means = self.difference("fine-tuned"), self.accuracy.mean(1)
        winner = {
            1: "the fine-tuned one wins",
            0: "they cannot be told apart",
            -1: "the one from scratch wins",
        }
        return (
            "Fine-tuned from the encoder less the same network from scratch: "
            f"{100 * found.mean:+.2f} percentage points of accuracy ({LEVEL:.0%} interval "
            f"{_interval(found)}): {winner[found.sign]}. Most often right: "
            f"{self.ways[int(means.argmax())]}, {100 * means.max():.1f} %."
        )

    def to_frame(self) -> pd.DataFrame:
        """One row a way and a draw: way, seed, accuracy, log_loss."""
        index = pd.MultiIndex.from_product([self.ways, self.seeds], names=["way", "seed"])
        columns = {name: getattr(self, name).flatten().numpy() for name in MEASURES}
        return pd.DataFrame(columns, index=index).reset_index()

    def __repr__(self) -> str:
        head = (
            f"{len(self.seeds)} draws of {self.num_labels} labels of {self.num_classes} classes, "
            f"scored on {self.num_test} held-out rows; ±: sd over draws; paired differences to "
            f"the network from scratch, with {LEVEL:.0%} intervals"
        )
        titles = ("", "accuracy, %", "log loss, nats per datum", "accuracy, points", "log loss")
        lines = [head, render([*map(self._cells, self.ways)], titles), self.verdict]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _cells(self, way: str) -> tuple[str, ...]:
        accuracy, loss = (getattr(self, name)[self.ways.index(way)] for name in MEASURES)
        means = (
            f"{100 * accuracy.mean():.1f} ± {100 * accuracy.std():.1f}",
            f"{loss.mean():.3f} ± {loss.std():.3f}",
        )
        if way == "scratch":
            return (way, *means, "", "")
        points, nats = self.difference(way), self.difference(way, measure="log_loss")
        return (
            way,
            *means,
            f"{100 * points.mean:+.2f} ({_interval(points)})",
            f"{nats.mean:+.3f} ({nats.low:+.3f} to {nats.high:+.3f})",
        )


def _interval(found: PairedDifference) -> str:
    return f"{100 * found.low:+.2f} to {100 * found.high:+.2f}"


def label_efficiency(
    pair: DecoderModel,
    x: ArrayLike,
    y: ArrayLike,
    x_test: ArrayLike,
    y_test: ArrayLike,
    *,
    num_labels: int = 50,
    seeds: Iterable[int] = range(10),
    steps: int = 300,
    batch_size: int | None = None,
    lr: float = 3e-3,
    device: str | torch.device = "auto",
) -> LabelEfficiency:
    """Classify from a few labels: what is an encoder worth that was learned without any?

    For each seed the labels of some rows are drawn, and these rows alone are learned from: by
    the network that begins as the pair's encoder, by the same network from scratch, by a head on
    the frozen encoder (:class:`~ppl_vae.models.supervised.SupervisedEncoder`), and by logistic
    regression on the columns of x (scikit-learn's, C = 1). The three networks have the same rows,
    initial head, steps, batches and learning rate.

    Args:
        pair: fitted without labels, and not to the held-out rows; left as it is.
        x, y: rows and their classes, of which few are shown: (N, D), (N,).
        x_test, y_test: rows to score.
        num_labels: how many labels are drawn, each class as often as its share says, at least
            once.
        seeds: of the draws of labels, initial weights and batches; two or more.
        steps, batch_size, lr, device: as :func:`ppl_vae.fit_svi` takes them.

    Raises:
        ValueError: if there are fewer labels than classes, or more than rows; fewer than two
            seeds; classes in y_test that y has not; what
            :class:`~ppl_vae.models.supervised.SupervisedEncoder` refuses.
        TypeError: if the pair's guide has no encoder.

    References:
        Erhan et al.: Why does unsupervised pre-training help deep learning? (2010).
    """
    x, x_test = as_matrix(x, device="cpu"), as_matrix(x_test, name="x_test", device="cpu")
    names, codes, codes_test = _classes(y, y_test, (len(x), len(x_test)))
    seeds = tuple(seeds)
    if len(seeds) < 2:
        raise ValueError(f"an interval needs at least two seeds; got {seeds}")
    _check_labels(num_labels, len(names), len(x))
    how: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "lr": lr, "device": device}
    holed = bool(x.isnan().any() or x_test.isnan().any())
    ways = (*NETWORKS, *(() if holed else (LOGISTIC,)))
    found = torch.empty(2, len(ways), len(seeds), dtype=torch.float64)
    for draw, seed in enumerate(seeds):
        rows = draw_labels(codes, num_labels, seed)
        for place, way in enumerate(ways):
            log_p = _log_p(way, pair, x[rows], codes[rows], x_test, how | {"seed": seed})
            found[:, place, draw] = _scores(log_p, codes_test)
    counts = {"num_labels": num_labels, "num_classes": len(names), "num_test": len(x_test)}
    notes = (HOLED,) if holed else ()
    return LabelEfficiency(ways, found[0], found[1], seeds, **counts, notes=notes)


def _classes(
    y: ArrayLike, y_test: ArrayLike, sizes: tuple[int, int]
) -> tuple[np.ndarray, Int[Tensor, " N"], Int[Tensor, " M"]]:
    given = [np.asarray(labels) for labels in (y, y_test)]
    if (shapes := [labels.shape for labels in given]) != [(sizes[0],), (sizes[1],)]:
        raise ValueError(
            f"y and y_test must have one class per row, {sizes}; their shapes: {shapes}"
        )
    names, codes = np.unique(given[0], return_inverse=True)
    places = np.searchsorted(names, given[1]).clip(max=len(names) - 1)
    if unknown := set(given[1][names[places] != given[1]].tolist()):
        raise ValueError(f"y_test has classes that y has not: {sorted(unknown, key=str)[:5]}")
    return names, torch.from_numpy(codes), torch.from_numpy(places)


def _check_labels(num_labels: int, num_classes: int, num_rows: int) -> None:
    if num_classes < 2:
        raise ValueError("y must have at least two classes; it has one")
    if not num_classes <= check_int("num_labels", num_labels) <= num_rows:
        raise ValueError(
            f"num_labels must be at least the number of classes, {num_classes}, and at most that "
            f"of rows, {num_rows}; got {num_labels}"
        )


def draw_labels(classes: Int[Tensor, " N"], num_labels: int, seed: int) -> Int[Tensor, " L"]:
    """Rows whose labels are shown: of each class one, and further ones by its share of the rows.

    Shares are rounded by Webster's method: each label goes to the class with the largest number of
    rows over 2 k + 1, where k labels are its own already.

    Args:
        classes: of each row, 0..C-1.
        num_labels: at least C, at most N.
        seed: of which rows they are.
    """
    sizes = torch.bincount(classes).numpy()
    quota = np.ones(len(sizes), dtype=int)
    for _ in range(num_labels - len(sizes)):
        quota[np.where(quota < sizes, sizes / (2 * quota + 1), -1.0).argmax()] += 1
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))
    chosen = [order[classes[order] == k][:number] for k, number in enumerate(quota)]
    return torch.cat(chosen)


def _log_p(
    way: str, pair: DecoderModel, x: Tensor, classes: Tensor, x_test: Tensor, how: dict[str, Any]
) -> Float[Tensor, "M C"]:
    """log p(y | x) of every class for held-out rows, learned from x and their classes."""
    if way == LOGISTIC:
        fitted = LogisticRegression(max_iter=10_000).fit(x.numpy(), classes.numpy())
        return torch.as_tensor(fitted.predict_log_proba(x_test.numpy())).double()
    num_classes = int(classes.max()) + 1
    network = SupervisedEncoder(pair, Categorical(num_classes), encoder=way, seed=how["seed"])
    rows = network.rows(x, classes)
    fit_svi(network.model, network.guide, rows, progress=False, **how)
    density: Any = network.predict(x_test)
    return density.base_dist.logits[:, 0].double().cpu()


def _scores(log_p: Float[Tensor, "M C"], classes: Int[Tensor, " M"]) -> Float[Tensor, "2"]:
    """Accuracy, and minus the mean log p of the classes."""
    right = (log_p.argmax(1) == classes).double().mean()
    return torch.stack([right, -log_p.gather(1, classes[:, None]).mean()])
