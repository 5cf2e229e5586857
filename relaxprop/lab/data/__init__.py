"""Image classification data and a text, each split as one tensor in memory.

May import: lab.data.dataset, lab.data.embedded, lab.data.images, lab.data.sources.
"""

from relaxprop.lab.data.dataset import DATA_VARIABLE, DATASETS, DataError, Dataset, Split, title_of
from relaxprop.lab.data.embedded import TEXT_LENGTH
from relaxprop.lab.data.images import Colour
from relaxprop.lab.data.sources import check_name, check_reading, check_spelling, load

__all__ = [
    "DATASETS",
    "DATA_VARIABLE",
    "TEXT_LENGTH",
    "Colour",
    "DataError",
    "Dataset",
    "Split",
    "check_name",
    "check_reading",
    "check_spelling",
    "load",
    "title_of",
]
