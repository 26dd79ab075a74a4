from .files.table_options import TableOptions as TableOptions
from .files.table_output import check_output as check_output
from .files.table_output import write_frame as write_frame
from .files.tables import Table as Table
from .files.tables import digits_table as digits_table
from .files.tables import read_table as read_table
from .grey_values import Dequantization as Dequantization
from .grey_values import binarize as binarize
from .handwritten_digits import digits as digits
from .image_grid import ImageGrid as ImageGrid
from .images import Images as Images
from .images import image_set as image_set
from .sources.block_source import BlockSource as BlockSource
from .sources.row_blocks import RowBlocks as RowBlocks
from .sources.row_sources import row_source as row_source
from .splits import Split as Split
from .splits import split as split
from .texts import WordCounts as WordCounts
from .texts import count_words as count_words
from .units import Units as Units
from .units import choose_scaling as choose_scaling

__all__ = [
    "BlockSource",
    "Dequantization",
    "ImageGrid",
    "Images",
    "RowBlocks",
    "Split",
    "Table",
    "TableOptions",
    "Units",
    "WordCounts",
    "binarize",
    "check_output",
    "choose_scaling",
    "count_words",
    "digits",
    "digits_table",
    "image_set",
    "read_table",
    "row_source",
    "split",
    "write_frame",
]
