"""Known layouts of training data into TRL's conversational vision format, in which every content part is one slice."""

from hf_sugar.models.rows_sugar import row_name

from .checks import CheckReport, Problem, check_dataset, check_rows_structure, validate_rows
from .readers import ROW_FEATURES, load_data, load_table
from .rows import captions_by_image, load_image, row_slices


__all__ = [
    "ROW_FEATURES",
    "CheckReport",
    "Problem",
    "captions_by_image",
    "check_dataset",
    "check_rows_structure",
    "load_data",
    "load_image",
    "load_table",
    "row_name",
    "row_slices",
    "validate_rows",
]
