from .guides import AmortizedGuide as AmortizedGuide
from .guides import ExactGuide as ExactGuide
from .guides import GaussianGuide as GaussianGuide
from .guides import PerDatumGuide as PerDatumGuide

__all__ = [
    "AmortizedGuide",
    "ExactGuide",
    "GaussianGuide",
    "PerDatumGuide",
]
