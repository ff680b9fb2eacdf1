"""Retrieval and answering tasks, their metrics with confidence intervals, reports and plots. Names are imported when they
are first touched: matplotlib is not loaded by what draws nothing."""

import importlib
from typing import TYPE_CHECKING


_NAMES = {
    "metrics": "Estimate bootstrap_interval ranks recall_at_k",
    "tasks": "WINOGROUND_CHANCE EvaluationData evaluate_tasks exact_match image_text_pairs image_text_retrieval "
    "interleaved_retrieval load_tasks winoground",
    "ceilings": "chance kernel_settings label_ceilings",
    "report": "report_table terminal_table to_dict write_report",
    "plots": "best_hits plot_alignment plot_curves plot_gallery plot_losses plot_similarities write_pictures",
    "published": "BENCHMARKS load_benchmarks",
}
_MODULE_OF = {name: f"hf_sugar.evaluation.{module}" for module, names in _NAMES.items() for name in names.split()}
__all__ = list(_MODULE_OF)

if TYPE_CHECKING:  # the same for type checkers
    from .ceilings import *
    from .metrics import *
    from .plots import *
    from .published import *
    from .report import *
    from .tasks import *

# former names, for one release
_RENAMED = {
    "Figure": ("hf_sugar.evaluation.metrics", "Estimate"),
    "embedder": ("hf_sugar.inference", "SugarEmbedder"),
    "generator": ("hf_sugar.inference", "SugarGenerator"),
}


def __getattr__(name: str):
    if name not in _MODULE_OF and name not in _RENAMED:
        raise AttributeError(f"module 'hf_sugar.evaluation' has no attribute '{name}'")
    module, name = _RENAMED.get(name, (_MODULE_OF.get(name), name))
    return getattr(importlib.import_module(module), name)


def __dir__():
    return __all__
