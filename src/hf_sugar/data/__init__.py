"""Known layouts of training data into TRL's conversational vision format, in which every content part is one slice."""

from hf_sugar.models.rows_sugar import row_name

from .checks import CheckReport, Problem, check_dataset, validate_rows
from .files import load_table
from .images import captions_by_image, load_image, row_slices, stored_image
from .load import ROW_FEATURES, load_data


__all__ = [
    "ROW_FEATURES",
    "CheckReport",
    "Problem",
    "captions_by_image",
    "check_dataset",
    "load_data",
    "load_image",
    "load_table",
    "row_name",
    "row_slices",
    "stored_image",
    "validate_rows",
]
