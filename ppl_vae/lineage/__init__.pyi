from .names import STAGE_NAMES as STAGE_NAMES
from .problem import LineageSettings as LineageSettings
from .report_data import ReportData as ReportData
from .report_data import report_data as report_data
from .result import Lineage as Lineage
from .run import run_lineage as run_lineage
from .sparse_run import SparseLineage as SparseLineage
from .sparse_run import run_sparse_lineage as run_sparse_lineage
from .stage import Stage as Stage
from .stages import STAGES as STAGES

__all__ = [
    "STAGES",
    "STAGE_NAMES",
    "Lineage",
    "LineageSettings",
    "ReportData",
    "SparseLineage",
    "Stage",
    "report_data",
    "run_lineage",
    "run_sparse_lineage",
]
