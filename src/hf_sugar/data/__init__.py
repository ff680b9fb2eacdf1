"""Known layouts of training data into TRL's conversational vision format, in which every content part is one slice."""

import importlib.util
import sys
from pathlib import Path


# The rules of rows travel with the model, so their file is among the models', whose package needs torch. Here it is loaded
# by itself, under its name, so that reading and checking data starts without.
if "hf_sugar.models.rows_sugar" not in sys.modules:
    _file = Path(__file__).parents[1] / "models" / "rows_sugar.py"
    _spec = importlib.util.spec_from_file_location("hf_sugar.models.rows_sugar", _file)
    sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_spec.name])

from hf_sugar.models.rows_sugar import row_name  # noqa: E402

from .checks import CheckReport, Problem, check_dataset, validate_rows  # noqa: E402
from .files import load_table  # noqa: E402
from .images import captions_by_image, load_image, row_slices, stored_image  # noqa: E402
from .load import ROW_FEATURES, load_data  # noqa: E402


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
