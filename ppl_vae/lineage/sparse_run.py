"""The sparse lineage: from separately optimized codes to codes computed by an encoder.

Every stage has the same model, a dictionary of unit-length atoms under a Laplace prior, and the
same objective, log p(x, z) in nats per datum, normalizing constants included. Its loss relative to
dictionary learning by alternating exact steps is decomposed into a part due to the dictionary and
a part due to the codes.
"""

import math
import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.results import UNSAVED
from ppl_vae.core.text import counted
from ppl_vae.core.text_table import render
from ppl_vae.core.validation import ArrayLike, as_matrix, check_int
from ppl_vae.data.splits import split
from ppl_vae.lineage.sparse_metrics import CodeMetrics, SparseEvaluationContext, SparseRow
from ppl_vae.lineage.sparse_stages import REFERENCE, SPARSE_STAGES, SparseProblem, SparseSettings
from ppl_vae.lineage.stage import StageTable, select_stages
from ppl_vae.models.autoencoder import Autoencoder

if TYPE_CHECKING:
    import pandas


TEXT_WIDTH = 110
"""Maximal length of the lines of prose below the tables."""
SIGNIFICANT = 2.0
"""A difference is reported as such if it exceeds this multiple of its standard error."""
PARTS = {"train": "training", "test": "held-out"}
TITLES = ("log p(x, f(x))", "at MAP codes", "dictionary", "amortization", "zeros", "of MAP")
LEGEND = (
    "dictionary: log p(x, z*) at the MAP codes z* under the dictionary of the reference, "
    f"{REFERENCE}, minus that under the stage's own dictionary; amortization: log p(x, z*) minus "
    "log p(x, z) at the stage's own codes."
)


@dataclass(frozen=True, repr=False)
class SparseLineage(StageTable[SparseRow]):
    """The table of the sparse lineage, with its fitted models.

    Attributes:
        rows: one per stage, in order.
        about: sizes, penalty, noise scale, settings.
        pairs: the fitted autoencoders by stage; empty in a lineage that ``from_dict`` returns.
    """

    rows: tuple[SparseRow, ...]
    about: dict[str, Any]
    pairs: dict[str, Autoencoder] = field(default_factory=dict, compare=False, metadata=UNSAVED)

    def to_frame(self) -> "pandas.DataFrame":
        """One row per stage: train_... and test_... of each metric, steps and seconds."""
        import pandas as pd

        records = []
        for row in self.rows:
            metrics = {
                f"{part}_{name}": value
                for part in PARTS
                for name, value in getattr(row, part).to_dict().items()
            }
            records.append(metrics | {"steps": row.steps, "seconds": row.seconds})
        return pd.DataFrame(
            records, index=pd.Index([row.stage for row in self.rows], name="stage")
        )

    def __repr__(self) -> str:
        about = self.about
        lines: list[str] = [
            f"sparse codes of {counted(about['data_dim'], 'column')} by "
            f"{counted(about['latent_dim'], 'atom')}, penalty {about['penalty']:g}, noise "
            f"{about['noise_scale']:g}; nats per datum, ± one standard error",
            *(_table(self.rows, part, about[f"num_{part}"]) for part in PARTS),
            *_wrapped(LEGEND),
            *(line for text in self.sentences() for line in _wrapped(text)),
            *(line for note in self.fit_notes() for line in _wrapped(f"note: {note}", "  ")),
        ]
        return "\n".join(lines)

    def sentences(self) -> list[str]:
        """The stages with the best dictionary and the best encoder on held-out rows."""
        found = [_best_dictionary(min(self.rows, key=lambda row: row.test.dictionary))]
        encoders = [row for row in self.rows if not math.isnan(row.test.log_joint)]
        if encoders:
            found.append(_best_encoder(min(encoders, key=lambda row: row.test.loss)))
        return found


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, TEXT_WIDTH, subsequent_indent=indent, break_on_hyphens=False)


def _best_dictionary(best: SparseRow) -> str:
    if best.stage == REFERENCE:
        return f"On held-out rows no dictionary is better than that of {REFERENCE}."
    gain, error = -best.test.dictionary, best.test.dictionary_error
    difference = f"{gain:.3f} ± {error:.3f}"
    if gain > SIGNIFICANT * error:
        return (
            f"On held-out rows the dictionary of {best.stage} is better than that of {REFERENCE}, "
            f"by {difference}."
        )
    return (
        f"On held-out rows the dictionaries of {best.stage} and {REFERENCE} do not differ "
        f"significantly: {difference}."
    )


def _best_encoder(row: SparseRow) -> str:
    test = row.test
    return (
        f"On held-out rows the best encoder is that of {row.stage}: its loss relative to the MAP "
        f"codes under {REFERENCE}'s dictionary is {test.loss:.3f}, of which "
        f"{test.amortization:.3f} ± {test.amortization_error:.3f} is the amortization gap "
        f"({test.zeros:.0%} of its codes are zero, {test.best_zeros:.0%} of the MAP codes)."
    )


def _table(rows: tuple[SparseRow, ...], part: str, num_rows: int) -> str:
    header = [counted(num_rows, f"{PARTS[part]} row"), "codes", *TITLES, "sq. error"]
    cells = [[f"  {row.stage}", row.codes, *_cells(getattr(row, part))] for row in rows]
    if part == "train":
        header += ["steps", "s"]
        cells = [
            [*line, str(row.steps), f"{row.seconds:.1f}"]
            for line, row in zip(cells, rows, strict=True)
        ]
    return render(cells, header)


def _cells(metrics: CodeMetrics) -> list[str]:
    nats = (metrics.log_joint, metrics.best, metrics.dictionary, metrics.amortization)
    shares = (metrics.zeros, metrics.best_zeros)
    error = f"{metrics.squared_error:.4g}"
    return [*map(_format_nats, nats), *map(_format_share, shares), error]


def _format_nats(value: float) -> str:
    return "-" if math.isnan(value) else f"{round(value, 3) + 0.0:.3f}"


def _format_share(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f} %"


def run_sparse_lineage(
    x: ArrayLike,
    *,
    x_test: ArrayLike | None = None,
    latent_dim: int,
    penalty: float,
    noise_scale: float = 1.0,
    stages: Iterable[str] | None = None,
    settings: SparseSettings | None = None,
    seed: int = 0,
) -> SparseLineage:
    """Fit one dictionary model in six ways, and decompose the loss of each.

    The model is x | z ~ N(W z + b, sigma^2 I), columns of W of length one, z_k ~ Laplace of scale
    1 / penalty. W has the same random initial columns in every stage. The stages are:

        random-atoms      W stays at its initial value; the codes are MAP (lasso)
        alternating       exact updates of W and of the MAP codes in alternation
                          (:func:`ppl_vae.inference.fit_dictionary`); the reference
        per-datum-svi     W and a free code per datum, by SVI
        linear-encoder    W and z = S_t(A x + c), by SVI, with a learned threshold t: a sparse
                          autoencoder
        mlp-encoder       the same with hidden layers
        unrolled-encoder  the same with a few unrolled steps of learned ISTA

    Each is evaluated at its own codes and at the MAP codes under its own dictionary.

    Args:
        x: complete data, (N, D), of order one; 17 % are held out if there is no ``x_test``.
        x_test: held-out rows.
        latent_dim: K, the number of atoms; it may exceed D.
        penalty: lambda, in nats for each unit of |z_k|.
        noise_scale: sigma, in units of x. MAP codes depend on penalty sigma^2 alone.
        stages: names of stages, by default all of ``ppl_vae.lineage.sparse_stages.SPARSE_STAGES``.
            The reference is always included.
        settings: the settings of the fits.
        seed: the seed of the split, initial values and data order.

    Raises:
        ValueError: invalid data, x with missing values, an unknown stage, or a penalty, scale or
            size that is not positive.

    References:
        Olshausen, Field: Sparse coding with an overcomplete basis set (1997); Mairal, Bach, Ponce,
        Sapiro: Online learning for matrix factorization and sparse coding (2010); Gregor, LeCun:
        Learning fast approximations of sparse coding (2010); Cremer, Li, Duvenaud: Inference
        suboptimality in variational autoencoders (2018), for the gaps.
    """
    chosen = {stage.name for stage in select_stages(stages, SPARSE_STAGES)} | {REFERENCE}
    check_int("latent_dim", latent_dim)
    test = None if x_test is None else _complete(x_test, "x_test")
    data = split(_complete(x), test, seed=seed)
    problem = SparseProblem(
        train=torch.cat([data.train, data.val]),
        latent_dim=latent_dim,
        penalty=penalty,
        noise_scale=noise_scale,
        settings=settings or SparseSettings(),
        seed=seed,
    )
    context = SparseEvaluationContext(problem, data.test)
    evaluated = {
        name: context.fit_and_evaluate(stage)
        for name, stage in SPARSE_STAGES.items()
        if name in chosen
    }
    reference = evaluated[REFERENCE]
    rows = tuple(one.row(SPARSE_STAGES[name], reference) for name, one in evaluated.items())
    pairs = {name: one.autoencoder for name, one in evaluated.items()}
    return SparseLineage(rows, _describe(problem, len(data.test)), pairs)


def _describe(problem: SparseProblem, num_test: int) -> dict[str, Any]:
    return {
        "num_train": len(problem.train),
        "num_test": num_test,
        "data_dim": problem.train.shape[1],
        "latent_dim": problem.latent_dim,
        "penalty": problem.penalty,
        "noise_scale": problem.noise_scale,
        "settings": asdict(problem.settings),
        "seed": problem.seed,
    }


def _complete(x: ArrayLike, name: str = "x") -> Float[Tensor, "N D"]:
    x = as_matrix(x, name=name).double()
    if num_missing := int(x.isnan().sum()):
        raise ValueError(
            f"{name} has {num_missing} missing entries, and dictionary learning by exact steps "
            "needs complete rows; fill them, or fit an Autoencoder by fit_svi, which supports "
            "missing values"
        )
    return x
