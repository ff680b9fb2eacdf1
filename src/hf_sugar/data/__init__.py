"""Known layouts of training data into TRL's conversational vision format, in which every content part is one slice."""

from .checks import CheckReport, Problem, check_dataset, check_rows_structure, validate_rows
from .readers import ROW_FEATURES, load_data, read_llava_json, read_mmc4
from .rows import load_image, row_name, row_slices


__all__ = [
    "ROW_FEATURES",
    "CheckReport",
    "Problem",
    "check_dataset",
    "check_rows_structure",
    "load_data",
    "load_image",
    "read_llava_json",
    "read_mmc4",
    "row_name",
    "row_slices",
    "validate_rows",
]
