from .arviz import compare_elpds as compare_elpds
from .arviz import elpd as elpd
from .arviz import lineage_to_arviz as lineage_to_arviz
from .arviz import read_netcdf as read_netcdf
from .arviz import to_arviz as to_arviz
from .arviz import write_netcdf as write_netcdf
from .encoders import EncoderClassifier as EncoderClassifier
from .encoders import FeatureTransformer as FeatureTransformer
from .sklearn import PPCATransformer as PPCATransformer

__all__ = [
    "EncoderClassifier",
    "FeatureTransformer",
    "PPCATransformer",
    "compare_elpds",
    "elpd",
    "lineage_to_arviz",
    "read_netcdf",
    "to_arviz",
    "write_netcdf",
]
