"""The diagnosis of latent codes: posterior collapse, a lookup table, or neither."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ppl_vae.core.text import counted
from ppl_vae.evaluation.latent_space.collapse_statistics import (
    ACTIVE_VARIANCE,
    NEGLIGIBLE_BIAS,
    CollapseStatistics,
)

if TYPE_CHECKING:
    import pandas


NEGLIGIBLE_KL = 0.05
"""A KL per dimension below this, in nats, is treated as zero."""
HIGH_RETRIEVAL_PROB = 0.5
"""Above this mean retrieval probability the codes of different data hardly overlap."""
LARGE_MOMENT_SHARE = 0.1
"""The aggregate posterior is far from the prior if ``moment_kl`` exceeds this share of the KL."""
PRINTED_VARIANCES = 10
COLLAPSED, LOOKUP_TABLE = "posterior collapse", "lookup table"


@dataclass(frozen=True, repr=False)
class Collapse(CollapseStatistics):
    """The information in the codes of N data, in nats per datum, and what it implies.

    The statistics are those of
    :class:`~ppl_vae.evaluation.latent_space.collapse_statistics.CollapseStatistics`.
    """

    @property
    def failure(self) -> str | None:
        """The failure that is diagnosed, or None.

        ``"posterior collapse"``: no dimension is active, and the KL is near zero.
        ``"lookup table"``: codes identify their data, and lie far from the prior.
        """
        if not bool(self.active.any()):
            collapsed = self.mean_kl < NEGLIGIBLE_KL * len(self.names)
            return COLLAPSED if collapsed else None
        far = self.moment_kl > LARGE_MOMENT_SHARE * self.mean_kl
        return LOOKUP_TABLE if self._codes_identify_data and far else None

    @property
    def verdict(self) -> str:
        """The conclusion, in one sentence."""
        if self.failure == COLLAPSED:
            return f"{COLLAPSED}: {self._collapsed()}"
        if self.failure == LOOKUP_TABLE:
            return f"{LOOKUP_TABLE}: {self._retrieval()}, and q(z) is far from the prior"
        return self._active() if bool(self.active.any()) else self._inactive()

    def to_frame(self) -> "pandas.DataFrame":
        """One row per latent dimension, indexed by its name."""
        import pandas as pd

        columns = {
            "kl": self.kl_by_dimension.numpy(force=True),
            "mean_variance": self.mean_variances.numpy(force=True),
            "active": self.active.numpy(force=True),
        }
        return pd.DataFrame(columns, index=pd.Index(self.names, name="dimension"))

    def __repr__(self) -> str:
        return "\n".join([f"collapse: {self.verdict}", *(f"  {line}" for line in self._lines())])

    @property
    def _codes_identify_data(self) -> bool:
        return self.underestimated and float(self.retrieval_prob.mean()) > HIGH_RETRIEVAL_PROB

    @property
    def _without_means(self) -> bool:
        # The values of a discrete variable may be mere labels, which have no mean.
        return bool(self.mean_variances.isnan().all())

    def _retrieval(self) -> str:
        return f"codes identify their datum with probability {self.retrieval_prob.mean():.2f}"

    def _information(self) -> str:
        # Monte Carlo error may put the estimate above its upper bound; the bound is printed then.
        value = min(self.mutual_information, self.upper_bound)
        return f"mutual information {value:.3f} ± {self.mutual_information_error:.3f} nats"

    def _dimensions(self, several: str = "") -> str:
        number = len(self.names)
        return f"{several if number > 1 else ''}{counted(number, 'dimension')}"

    def _collapsed(self) -> str:
        near = "the prior"
        if self.depends_on_x:
            near = f"within {self.mean_kl:.3f} nats of the prior, and hardly depends on x"
        return f"q(z | x) is {near} in {self._dimensions('all ')}"

    def _inactive(self) -> str:
        if not self.depends_on_x:
            return (
                "q(z | x) differs from the prior, but no dependence on x is detected "
                f"({self._information()})"
            )
        text = f"q(z | x) depends on x, {self._information()}"
        if self._without_means:
            return text
        return f"{text}, although no posterior mean has a variance above {ACTIVE_VARIANCE:g}"

    def _active(self) -> str:
        text = f"{int(self.active.sum())} of {self._dimensions()} active"
        if off := int((~self.active & (self.kl_by_dimension < NEGLIGIBLE_KL)).sum()):
            text += f", {off} collapsed to the prior"
        if self._codes_identify_data:
            text += (
                f"; {self._retrieval()}: there are too few data, {len(self.kl)}, to distinguish "
                "them from a lookup table"
            )
        return text

    def _lines(self) -> Iterator[str]:
        yield (
            f"KL in nats per datum, ± one standard error: {self.mean_kl:z.3f} ± "
            f"{self.mean_kl_error:z.3f} = "
            f"mutual information {self.mutual_information:z.3f} ± "
            f"{self.mutual_information_error:z.3f} + KL(q(z) || p(z)) "
            f"{self.aggregate_kl:z.3f} ± {self.aggregate_kl_error:z.3f}"
        )
        yield from self._bounds()
        if not self._without_means:
            variances = sorted(self.mean_variances.tolist(), reverse=True)
            shown = [f"{value:z.3f}" for value in variances[:PRINTED_VARIANCES]]
            dots = ["..."] if len(variances) > PRINTED_VARIANCES else []
            yield f"variances of the posterior means: {' '.join([*shown, *dots])}"
        if self.spectrum is not None:
            (noise,) = self.spectrum.noise.values()
            off, k = len(self.spectrum.collapsing(noise)), self.spectrum.latent_dim
            used = f"{k - off} of {counted(k, 'axis')}"
            yield f"PPCA with this noise variance, {noise:.3g}, uses {used}"

    def _bounds(self) -> Iterator[str]:
        bounds = f"at most {self.upper_bound:.3f}"
        if self.above_upper_bound:
            yield f"the mutual information is {bounds}; the excess is Monte Carlo error"
        else:
            bounds = f"at least {self.mutual_information:.3f} and {bounds}"
        if self.underestimated:
            yield (
                f"there are too few data, {len(self.kl)}, to estimate the mutual information "
                f"without bias: it is {bounds}"
            )
            if self.saturated:
                yield f"no estimate from N data exceeds log N = {self.max_mutual_information:.3f}"
        elif self.bias > NEGLIGIBLE_BIAS:
            yield (
                f"bias: the mutual information is about {self.bias:.3f} too small, "
                "KL(q(z) || p(z)) too large by the same amount"
            )
