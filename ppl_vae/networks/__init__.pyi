from .corruption import GaussianNoise as GaussianNoise
from .corruption import MaskingNoise as MaskingNoise
from .mlp_conv import conv_decoder as conv_decoder
from .mlp_conv import conv_encoder as conv_encoder
from .mlp_conv import mlp as mlp
from .mlp_conv import output_bias as output_bias
from .mlp_conv import zero_output as zero_output
from .patches import HiddenPatches as HiddenPatches
from .patches import Patches as Patches
from .sparse_layers import LISTA as LISTA
from .sparse_layers import NormalizedColumns as NormalizedColumns
from .sparse_layers import SoftThreshold as SoftThreshold
from .sparse_layers import TiedEncoder as TiedEncoder
from .sparse_layers import soft_threshold as soft_threshold
from .transformers import PatchDecoder as PatchDecoder
from .transformers import PatchTransformer as PatchTransformer

__all__ = [
    "LISTA",
    "GaussianNoise",
    "HiddenPatches",
    "MaskingNoise",
    "NormalizedColumns",
    "PatchDecoder",
    "PatchTransformer",
    "Patches",
    "SoftThreshold",
    "TiedEncoder",
    "conv_decoder",
    "conv_encoder",
    "mlp",
    "output_bias",
    "soft_threshold",
    "zero_output",
]
