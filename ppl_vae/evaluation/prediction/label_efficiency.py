"""Classification from few labels with an encoder that was trained without labels."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ppl_vae.core.arrays.schema import TableSchema
from ppl_vae.core.fit_result import FitResult
from ppl_vae.core.results import Result
from ppl_vae.core.stats import mean_and_error
from ppl_vae.core.text import counted
from ppl_vae.core.text_table import render
from ppl_vae.core.validation import ArrayLike, as_matrix, check_int, check_option
from ppl_vae.inference.svi.fit import fit_svi
from ppl_vae.likelihoods.discrete import Categorical
from ppl_vae.models.decoder_model import DecoderModel
from ppl_vae.models.supervised import SupervisedEncoder

if TYPE_CHECKING:
    import pandas


NETWORKS = ("scratch", "fine-tuned", "frozen")
LOGISTIC = "logistic regression"
METRICS = ("accuracy", "log_loss")
CONFIDENCE_LEVEL = 0.95
MISSING_NOTE = f"x has missing values, which {LOGISTIC} does not support; it was left out"


@dataclass(frozen=True)
class PairedDifference(Result):
    """The mean of paired differences, with a confidence interval by Student's t.

    Attributes:
        mean: the mean of the differences.
        low, high: the ends of the 95 % confidence interval.
    """

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, differences: Float[Tensor, " S"]) -> "PairedDifference":
        """mean ± t_{S-1} sd / sqrt(S), with t the 97.5 % quantile of Student's distribution."""
        from scipy import stats

        mean, error = mean_and_error(differences)
        half_width = float(stats.t.ppf((1 + CONFIDENCE_LEVEL) / 2, len(differences) - 1)) * error
        return cls(mean, mean - half_width, mean + half_width)

    @property
    def sign(self) -> int:
        """1 or -1 if the interval excludes zero, else 0 (no significant difference)."""
        return int(self.low > 0) - int(self.high < 0)


@dataclass(frozen=True, repr=False)
class LabelEfficiency(Result):
    """Scores on the same held-out rows of classifiers that were trained on draws of few labels.

    Intervals are over the draws of labels and of initial weights, conditional on the pair and the
    held-out rows.

    Attributes:
        methods: ``"scratch"``, ``"fine-tuned"``, ``"frozen"``, ``"logistic regression"``.
        accuracy: the share of held-out rows whose most probable class is correct, for each method
            and draw.
        log_loss: minus the mean of log p(y | x) over held-out rows, in nats per datum.
        seeds: the seeds of the draws.
        num_labels: the number of labels in each draw.
        num_classes: C.
        num_test: the number of held-out rows.
        notes: caveats.
    """

    methods: tuple[str, ...]
    accuracy: Float[Tensor, "W S"]
    log_loss: Float[Tensor, "W S"]
    seeds: tuple[int, ...]
    num_labels: int
    num_classes: int
    num_test: int
    notes: tuple[str, ...] = ()

    def difference(
        self, method: str, other: str = "scratch", metric: str = "accuracy"
    ) -> PairedDifference:
        """The score of one method minus that of another, paired by draw.

        Args:
            method, other: two of the methods.
            metric: ``"accuracy"`` or ``"log_loss"``.

        Raises:
            ValueError: if there is no such method or metric.
        """
        values = getattr(self, check_option("metric", metric, METRICS))
        first = self.methods.index(check_option("method", method, self.methods))
        second = self.methods.index(check_option("other", other, self.methods))
        return PairedDifference.of(values[first] - values[second])

    @property
    def verdict(self) -> str:
        """Whether fine-tuning is more accurate than training from scratch; the best method."""
        found, means = self.difference("fine-tuned"), self.accuracy.mean(1)
        conclusion = {
            1: "fine-tuning is more accurate",
            0: "no significant difference",
            -1: "training from scratch is more accurate",
        }
        return (
            "Accuracy of the fine-tuned encoder minus that of the same network from scratch: "
            f"{100 * found.mean:+.2f} percentage points ({CONFIDENCE_LEVEL:.0%} interval "
            f"{_interval(found)}): {conclusion[found.sign]}. Most accurate: "
            f"{self.methods[int(means.argmax())]}, {100 * means.max():.1f} %."
        )

    def to_frame(self) -> "pandas.DataFrame":
        """One row per method and draw: method, seed, accuracy, log_loss."""
        import pandas as pd

        index = pd.MultiIndex.from_product([self.methods, self.seeds], names=["method", "seed"])
        columns = {name: getattr(self, name).flatten().numpy(force=True) for name in METRICS}
        return pd.DataFrame(columns, index=index).reset_index()

    def __repr__(self) -> str:
        head = (
            f"{counted(len(self.seeds), 'draw')} of {counted(self.num_labels, 'label')} of "
            f"{self.num_classes} classes, scored on {counted(self.num_test, 'held-out row')}; "
            "± one standard deviation over draws; paired differences to the network from scratch, "
            f"with {CONFIDENCE_LEVEL:.0%} intervals"
        )
        titles = ("", "accuracy, %", "log loss, nats per datum", "accuracy, points", "log loss")
        lines = [head, render([*map(self._cells, self.methods)], titles), self.verdict]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _cells(self, method: str) -> tuple[str, ...]:
        accuracy, loss = (getattr(self, name)[self.methods.index(method)] for name in METRICS)
        means = (
            f"{100 * accuracy.mean():.1f} ± {100 * accuracy.std():.1f}",
            f"{loss.mean():.3f} ± {loss.std():.3f}",
        )
        if method == "scratch":
            return (method, *means, "", "")
        points, nats = self.difference(method), self.difference(method, metric="log_loss")
        return (
            method,
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
    """Compare classifiers from few labels that use an encoder trained without labels.

    For each seed the labels of some rows are drawn, and four classifiers are trained on these rows
    alone: the pair's encoder, fine-tuned; the same network from scratch; a linear head on the
    frozen encoder (:class:`~ppl_vae.models.supervised.SupervisedEncoder`); and logistic regression
    on the columns of x (scikit-learn's, C = 1). The three networks share rows, initial head,
    number of steps, minibatches and learning rate.

    Args:
        pair: a pair fitted without labels, and not to the held-out rows; it is not changed.
        x, y: rows and their classes, of which few are used: (N, D), (N,).
        x_test, y_test: held-out rows and their classes.
        num_labels: the number of labels drawn, each class in proportion to its share of the rows
            and at least once.
        seeds: seeds of the draws of labels, initial weights and minibatches; two or more.
        steps, batch_size, lr, device: arguments of :func:`ppl_vae.fit_svi`.

    Raises:
        ValueError: if there are fewer labels than classes or more than rows, fewer than two seeds,
            or classes in y_test that are not in y; if the pair is not supported by
            :class:`~ppl_vae.models.supervised.SupervisedEncoder`.
        TypeError: if the pair's guide has no encoder.

    References:
        Erhan et al.: Why does unsupervised pre-training help deep learning? (2010).
    """
    schema = TableSchema.of(x)
    x_test = as_matrix(x_test, name="x_test", schema=schema, device="cpu")
    x = as_matrix(x, device="cpu")
    names, codes, codes_test = _classes(y, y_test, (len(x), len(x_test)))
    seeds = tuple(seeds)
    if len(seeds) < 2:
        raise ValueError(f"an interval needs at least two seeds; got {seeds}")
    _check_labels(num_labels, len(names), len(x))
    fit = partial(
        fit_svi, steps=steps, batch_size=batch_size, lr=lr, device=device, progress=False
    )
    has_missing = bool(x.isnan().any() or x_test.isnan().any())
    methods = NETWORKS if has_missing else (*NETWORKS, LOGISTIC)
    scores = torch.empty(2, len(methods), len(seeds), dtype=torch.float64)
    for draw, seed in enumerate(seeds):
        rows = draw_labels(codes, num_labels, seed)
        for place, method in enumerate(methods):
            log_p = _log_p(method, pair, x[rows], codes[rows], x_test, seed, fit)
            scores[:, place, draw] = _scores(log_p, codes_test)
    return LabelEfficiency(
        methods=methods,
        accuracy=scores[0],
        log_loss=scores[1],
        seeds=seeds,
        num_labels=num_labels,
        num_classes=len(names),
        num_test=len(x_test),
        notes=(MISSING_NOTE,) if has_missing else (),
    )


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
        raise ValueError(f"y_test has classes that are not in y: {sorted(unknown, key=str)[:5]}")
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
    """Draw the rows whose labels are used: at least one per class, in proportion to its rows.

    Proportions are rounded by Webster's method: each further label goes to the class with the
    largest number of rows over 2 k + 1, where k is its current number of labels.

    Args:
        classes: the class of each row, 0..C-1.
        num_labels: at least C, at most N.
        seed: seed of the choice of rows.

    Returns:
        the rows, on the CPU, so that they are the same for any device.
    """
    classes = classes.cpu()
    sizes = torch.bincount(classes).numpy()
    quota = np.ones(len(sizes), dtype=int)
    for _ in range(num_labels - len(sizes)):
        quota[np.where(quota < sizes, sizes / (2 * quota + 1), -1.0).argmax()] += 1
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))
    chosen = [order[classes[order] == k][:number] for k, number in enumerate(quota)]
    return torch.cat(chosen)


def _log_p(
    method: str,
    pair: DecoderModel,
    x: Tensor,
    classes: Tensor,
    x_test: Tensor,
    seed: int,
    fit: Callable[..., FitResult],
) -> Float[Tensor, "M C"]:
    """log p(y | x) of every class for held-out rows, after training on x and their classes."""
    from sklearn.linear_model import LogisticRegression

    if method == LOGISTIC:
        fitted = LogisticRegression(max_iter=10_000).fit(
            x.numpy(force=True), classes.numpy(force=True)
        )
        return torch.as_tensor(fitted.predict_log_proba(x_test.numpy(force=True))).double()
    num_classes = int(classes.max()) + 1
    network = SupervisedEncoder(pair, Categorical(num_classes), encoder=method, seed=seed)
    rows = network.rows(x, classes)
    fit(network.model, network.guide, rows, seed=seed)
    density: Any = network.predict(x_test)
    return density.base_dist.logits[:, 0].double().cpu()


def _scores(log_p: Float[Tensor, "M C"], classes: Int[Tensor, " M"]) -> Float[Tensor, "2"]:
    """Accuracy, and minus the mean of log p(y | x)."""
    accuracy = (log_p.argmax(1) == classes).double().mean()
    return torch.stack([accuracy, -log_p.gather(1, classes[:, None]).mean()])
