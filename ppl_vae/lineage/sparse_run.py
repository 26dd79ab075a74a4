"""The lineage of sparse codes: from a free code per datum to codes that an encoder reads off x.

Every stage has the same model, a dictionary of unit atoms under a Laplace prior, and the same
objective, log p(x, z) in nats per datum, constants kept. What it loses against dictionary learning
by exact steps in turn is the dictionary's part, and the codes' part.
"""

import math
import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.results import Result, aligned, plain
from ppl_vae.core.validation import ArrayLike, as_matrix, check_int, check_option
from ppl_vae.data.transforms import split
from ppl_vae.lineage.sparse_metrics import Coded, EvaluationContext, SparseRow
from ppl_vae.lineage.sparse_stages import REFERENCE, SPARSE_STAGES, SparseSettings, SparseTask
from ppl_vae.models.autoencoder import Autoencoder

WIDTH = 110
"""Of what is said below the tables, in letters."""
SURE = 2.0
"""A difference is called one beyond so many of its standard errors."""


@dataclass(frozen=True, repr=False)
class SparseLineage(Result):
    """The table of the lineage, and what it was made of.

    Attributes:
        rows: one a stage, in order.
        about: sizes, penalty, noise, settings.
        pairs: the fitted autoencoders by stage; empty in a lineage read back by :meth:`from_dict`.
    """

    rows: tuple[SparseRow, ...]
    about: dict[str, Any]
    pairs: dict[str, Autoencoder] = field(default_factory=dict, compare=False)

    def row(self, stage: str) -> SparseRow:
        """The row of a stage."""
        return next(row for row in self.rows if row.stage == stage)

    def to_dict(self) -> dict[str, Any]:
        """``about`` and the rows, as JSON can hold them."""
        return {name: plain(getattr(self, name)) for name in ("about", "rows")}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Self:
        """The lineage without its pairs, from what :meth:`to_dict` gave."""
        return cls(tuple(map(SparseRow.from_dict, content["rows"])), content["about"])

    def to_frame(self) -> pd.DataFrame:
        """One row a stage: train_... and test_... of each number, steps and seconds."""
        return pd.DataFrame(
            [
                {
                    f"{part}_{k}": v
                    for part in PARTS
                    for k, v in getattr(row, part).__dict__.items()
                }
                | {"steps": row.steps, "seconds": row.seconds}
                for row in self.rows
            ],
            index=pd.Index([row.stage for row in self.rows], name="stage"),
        )

    def __repr__(self) -> str:
        about = self.about
        lines: list[str] = [
            f"sparse codes of {about['data_dim']} columns by {about['latent_dim']} atoms, penalty "
            f"{about['penalty']:g}, noise {about['noise_scale']:g}; nats per datum",
            *(line for part in PARTS for line in _table(self.rows, part, about[f"num_{part}"])),
            *_wrapped(_LEGEND),
            *(line for text in self.sentences() for line in _wrapped(text)),
            *(line for note in self.notes() for line in _wrapped(f"note: {note}", "  ")),
        ]
        return "\n".join(lines)

    def notes(self) -> list[str]:
        """What a person should know of the fits, each note once."""
        by_note: dict[str, list[str]] = {}
        for row in self.rows:
            for note in () if row.fit is None else row.fit.notes:
                by_note.setdefault(note, []).append(row.stage)
        return [f"{note} ({', '.join(names)})" for note, names in by_note.items()]

    def sentences(self) -> list[str]:
        """Which dictionary and whose codes are the best on held-out rows."""
        found = [_of_the_dictionary(min(self.rows, key=lambda row: row.test.dictionary))]
        encoders = [row for row in self.rows if not math.isnan(row.test.log_joint)]
        if encoders:
            found.append(_of_the_encoder(min(encoders, key=lambda row: row.test.lost)))
        return found


_LEGEND = (
    "dictionary: what the best codes under it lose against those under the reference's, "
    f"{REFERENCE}; amortization: what a stage's own codes lose against the best under its "
    "dictionary."
)
PARTS = {"train": "training", "test": "held-out"}
_TITLES = ("log p(x, f(x))", "at best codes", "dictionary", "amortization", "zeros", "of best")


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False)


def _of_the_dictionary(best: SparseRow) -> str:
    if best.stage == REFERENCE:
        return f"No dictionary codes held-out rows better than that of {REFERENCE}."
    lead, error = -best.test.dictionary, best.test.dictionary_error
    by = f"{lead:.3f} ± {error:.3f}"
    if lead > SURE * error:
        return (
            f"On held-out rows the dictionary of {best.stage} is better than that of {REFERENCE}, "
            f"by {by}."
        )
    return (
        f"On held-out rows the dictionaries of {best.stage} and {REFERENCE} cannot be told apart: "
        f"{by}."
    )


def _of_the_encoder(row: SparseRow) -> str:
    test = row.test
    return (
        f"Of the encoders {row.stage} is the best on held-out rows: short of the best codes under "
        f"{REFERENCE}'s dictionary by {test.lost:.3f}, of which {test.amortization:.3f} ± "
        f"{test.amortization_error:.3f} for its codes ({test.zeros:.0%} zeros; the best under its "
        f"dictionary {test.best_zeros:.0%})."
    )


def _table(rows: tuple[SparseRow, ...], part: str, number: int) -> list[str]:
    titles = (f"{number} {PARTS[part]} rows", "codes", *_TITLES, "sq. error")
    training = part == "train"
    body = [
        (
            f"  {row.stage}",
            row.codes,
            *_cells(getattr(row, part)),
            *((str(row.steps), f"{row.seconds:.1f}") if training else ()),
        )
        for row in rows
    ]
    return aligned([(*titles, *(("steps", "s") if training else ())), *body])


def _cells(coded: Coded) -> tuple[str, ...]:
    nats = (coded.log_joint, coded.best, coded.dictionary, coded.amortization)
    shares = (coded.zeros, coded.best_zeros)
    written = (*(_number(value) for value in nats), *(_share(value) for value in shares))
    return (*written, f"{coded.squared_error:.4g}")


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{round(value, 3) + 0.0:.3f}"


def _share(value: float) -> str:
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
    """Learn one dictionary model in six ways, and measure what each loses.

    The model is x | z ~ N(W z + b, sigma^2 I), columns of W of length one, z_k ~ Laplace of scale
    1 / penalty. W starts as the same random directions at every stage; fitted are

        random-atoms      nothing: W stays as it is, codes are the lasso's
        alternating       W and exact codes in turn (:func:`ppl_vae.fit_dictionary`); the reference
        per-datum-svi     W and a free code per datum, by SVI
        linear-encoder    W and z = S_t(A x + c), by SVI, with a learned t: a sparse autoencoder
        mlp-encoder       the same with hidden layers
        unrolled-encoder  the same with some steps of ISTA, learned

    Each is measured at its own codes and, under its own dictionary, at the best ones.

    Args:
        x: complete data, (N, D), of order one; 17 % are held out if there is no ``x_test``.
        x_test: held-out rows.
        latent_dim: K, the number of atoms; more than D if wanted.
        penalty: lambda, in nats for each unit of |z_k|.
        noise_scale: sigma, in units of x. Best codes depend on penalty sigma^2 alone.
        stages: names of stages, by default all of ``ppl_vae.lineage.sparse_stages.SPARSE_STAGES``.
            The reference is always among them.
        settings: of the fits.
        seed: of everything that is drawn.

    Raises:
        ValueError: bad data, x with missing values, an unknown stage, numbers that are not
            positive.

    References:
        Olshausen, Field: Sparse coding with an overcomplete basis set (1997); Mairal, Bach, Ponce,
        Sapiro: Online learning for matrix factorization and sparse coding (2010); Gregor, LeCun:
        Learning fast approximations of sparse coding (2010); Cremer, Li, Duvenaud: Inference
        suboptimality in variational autoencoders (2018), of gaps.
    """
    chosen = [check_option("stages", name, SPARSE_STAGES) for name in stages or SPARSE_STAGES]
    names = [name for name in SPARSE_STAGES if name in {*chosen, REFERENCE}]
    check_int("latent_dim", latent_dim)
    data = split(_complete(x), None if x_test is None else _complete(x_test, "x_test"), seed=seed)
    train, settings = torch.cat([data.train, data.val]), settings or SparseSettings()
    task = SparseTask(train, latent_dim, penalty, noise_scale, settings, seed)
    ground = EvaluationContext(task, data.test)
    reference = ground.run(SPARSE_STAGES[REFERENCE])
    climbed = {
        name: reference if name == REFERENCE else ground.run(SPARSE_STAGES[name]) for name in names
    }
    rows = tuple(one.row(SPARSE_STAGES[name], reference) for name, one in climbed.items())
    about = {
        "num_train": len(train),
        "num_test": len(data.test),
        "data_dim": train.shape[1],
        "latent_dim": latent_dim,
        "penalty": penalty,
        "noise_scale": noise_scale,
        "settings": asdict(settings),
        "seed": seed,
    }
    return SparseLineage(rows, about, {name: one.autoencoder for name, one in climbed.items()})


def _complete(x: ArrayLike, name: str = "x") -> Float[Tensor, "N D"]:
    x = as_matrix(x, name=name).double()
    if holes := int(x.isnan().sum()):
        raise ValueError(
            f"{name} has {holes} missing entries, and dictionary learning by exact steps needs "
            "complete rows; fill them, or fit an Autoencoder by fit_svi, which takes missing "
            "values"
        )
    return x
