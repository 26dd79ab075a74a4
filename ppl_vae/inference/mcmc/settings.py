"""The length of chains, their number, and how they are reported."""

from dataclasses import dataclass

from ppl_vae.core.validation import check_int
from ppl_vae.inference.svi.progress import ProgressCallback


@dataclass(frozen=True)
class ChainSettings:
    """What every sampler is given.

    Attributes:
        num_samples: draws of each chain, S.
        warmup: iterations of each chain before these, which adapt samplers that adapt.
        chains: the number of chains, which start at different points.
        seed: seed of the draws.
        progress: as in :func:`ppl_vae.inference.svi.fit.fit_svi`.
    """

    num_samples: int = 1000
    warmup: int = 1000
    chains: int = 4
    seed: int | None = None
    progress: bool | str | ProgressCallback = "auto"

    def __post_init__(self) -> None:
        check_int("num_samples", self.num_samples)
        check_int("warmup", self.warmup, 0)
        check_int("chains", self.chains)

    @property
    def same_everywhere(self) -> dict[str, int | None]:
        """What must be the same on all processes."""
        return {
            "num_samples": self.num_samples,
            "warmup": self.warmup,
            "chains": self.chains,
            "seed": self.seed,
        }

    @property
    def total(self) -> int:
        """The number of iterations of all chains."""
        return self.chains * (self.warmup + self.num_samples)


DEFAULT_SETTINGS = ChainSettings()
"""The settings of samplers that are not given others."""
