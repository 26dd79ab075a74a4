from .arrays.schema import TableSchema as TableSchema
from .autoguides import plate_of_rows as plate_of_rows
from .batch import Batch as Batch
from .errors import CheckpointError as CheckpointError
from .errors import ProcessError as ProcessError
from .fit_result import FitResult as FitResult
from .global_sites import condition_on_globals as condition_on_globals
from .imputed import Imputation as Imputation
from .pair import Pair as Pair
from .processes.messages import MessageLog as MessageLog
from .processes.messages import record_messages as record_messages
from .processes.ranks import Processes as Processes
from .processes.ranks import single_process as single_process
from .program import Program as Program
from .program import data_plate as data_plate
from .results import Result as Result
from .stats import mean_and_error as mean_and_error
from .stats import standard_error as standard_error

__all__ = [
    "Batch",
    "CheckpointError",
    "FitResult",
    "Imputation",
    "MessageLog",
    "Pair",
    "ProcessError",
    "Processes",
    "Program",
    "Result",
    "TableSchema",
    "condition_on_globals",
    "data_plate",
    "mean_and_error",
    "plate_of_rows",
    "record_messages",
    "single_process",
    "standard_error",
]
