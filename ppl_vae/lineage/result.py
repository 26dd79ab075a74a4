"""The result of a lineage: its table, the fitted pairs and the data."""

import html
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ppl_vae.core.program import ProgramLike
from ppl_vae.core.results import UNSAVED
from ppl_vae.core.text import counted
from ppl_vae.data.column_stats import CONSTANT_COLUMNS
from ppl_vae.data.splits import Split
from ppl_vae.data.units import Units
from ppl_vae.inference.mcmc.samples import PosteriorSamples
from ppl_vae.lineage.metrics import StageMetrics
from ppl_vae.lineage.stage import StageTable
from ppl_vae.lineage.table import html_table, legend, text_table

CLOSED_FORM = "closed-form"
MAX_LISTED = 10
"""Maximal number of columns that a note names; ``about`` has all."""
TEXT_WIDTH = 100
"""Maximal length of the lines of prose below a table of text."""


@dataclass(frozen=True, repr=False)
class Lineage(StageTable[StageMetrics]):
    """The table of a lineage, with its data and fitted pairs.

    Attributes:
        rows: one per stage, in order.
        optimum: the highest log p of PPCA that is known on the training rows, in nats per datum:
            the maximum of the exact log p over all its fits.
        about: the data, the split, the settings, versions.
        reference: the stage of that fit. Initially it is ``"closed-form"``, or with missing
            values ``"px-em"``, whether that stage is requested or not; a better fit replaces it.
            All shortfalls and angles are relative to the final reference.
        reference_gain: log p of the final reference minus that of the initial one, in nats per
            datum.
        pairs: the fitted pairs by stage, in the internal units (``extra`` pairs: in the data's).
        samples: the chains of each stage that samples the posterior of the parameters, in the
            data's units.
        data: the split, in the data's units.
        units: the internal units.

    The last four are None or empty in a lineage that ``from_dict`` returns.
    """

    rows: tuple[StageMetrics, ...]
    optimum: float
    about: dict[str, Any]
    reference: str = CLOSED_FORM
    reference_gain: float = 0.0
    pairs: dict[str, tuple[ProgramLike, ProgramLike]] = field(
        default_factory=dict, compare=False, metadata=UNSAVED
    )
    samples: dict[str, PosteriorSamples] = field(
        default_factory=dict, compare=False, metadata=UNSAVED
    )
    data: Split | None = field(default=None, compare=False, metadata=UNSAVED)
    units: Units | None = field(default=None, compare=False, metadata=UNSAVED)

    @property
    def finished(self) -> bool:
        """Whether all requested stages are in the table."""
        return len(self.rows) == len(self.about["stages"])

    @property
    def exact_optimum(self) -> bool:
        """Whether the optimum is that of the closed form."""
        return self.reference == CLOSED_FORM

    def notes(self) -> list[str]:
        """Skipped stages, constant columns, the choice of scale, and the notes of the fits."""
        skipped = self.about.get("left_out", {})
        found = [f"{name} is left out: {reason}" for name, reason in skipped.items()]
        if constant := self.about.get("constant_columns"):
            listed = ", ".join(constant[:MAX_LISTED])
            if len(constant) > MAX_LISTED:
                listed += f", ... ({len(constant)} in all)"
            found.append(f"{CONSTANT_COLUMNS}: {listed}")
        if note := self.about.get("scale_note"):
            found.append(note)
        return found + self.fit_notes()

    def __repr__(self) -> str:
        lines = [heading(self.about), text_table(self.rows)]
        texts = [legend(self.about), *(f"note: {note}" for note in self.notes())]
        wrapped = (textwrap.fill(text, TEXT_WIDTH, break_on_hyphens=False) for text in texts)
        return "\n".join([*lines, *wrapped])

    def _repr_html_(self) -> str:
        texts = [legend(self.about), *(f"note: {note}" for note in self.notes())]
        paragraphs = "\n".join(f"<p>{html.escape(text)}</p>" for text in texts)
        title = html.escape(heading(self.about))
        return f"<p>{title}</p>\n{html_table(self.rows)}\n{paragraphs}"


def heading(about: Mapping[str, Any]) -> str:
    """One line with the name and the size of the data, K and the seed."""
    num_rows = about["num_train"] + about["num_val"] + about["num_test"]
    missing = f", {counted(about['num_missing'], 'missing value')}" if about["num_missing"] else ""
    return (
        f"{about.get('data', 'data')}: {counted(num_rows, 'row')}, "
        f"{counted(about['data_dim'], 'column')}{missing}; "
        f"K = {about['latent_dim']}, seed {about['seed']}"
    )
