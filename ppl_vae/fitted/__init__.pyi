from .evaluation import Evaluation as Evaluation
from .filled_table import FilledTable as FilledTable
from .fit import fit_table as fit_table
from .folder import load_fitted as load_fitted
from .folder import save_fitted as save_fitted
from .metadata import FitMetadata as FitMetadata
from .model import FittedModel as FittedModel
from .settings import FitSettings as FitSettings
