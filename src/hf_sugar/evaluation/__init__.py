"""Retrieval and answering tasks, their metrics with confidence intervals, reports and plots. Names are imported when they
are first touched: matplotlib is not loaded by what draws nothing."""

import importlib


_MODULE_OF = {
    "Estimate": "metrics",
    "bootstrap_interval": "metrics",
    "ranks": "metrics",
    "recall_at_k": "metrics",
    "WINOGROUND_CHANCE": "tasks",
    "EvaluationData": "tasks",
    "evaluate_tasks": "tasks",
    "exact_match": "tasks",
    "image_text_pairs": "tasks",
    "image_text_retrieval": "tasks",
    "interleaved_retrieval": "tasks",
    "load_tasks": "tasks",
    "winoground": "tasks",
    "chance": "ceilings",
    "label_ceilings": "ceilings",
    "report_table": "report",
    "to_dict": "report",
    "write_report": "report",
    "plot_alignment": "plots",
    "plot_curves": "plots",
    "plot_gallery": "plots",
    "plot_losses": "plots",
    "plot_similarities": "plots",
    "write_pictures": "plots",
    "BENCHMARKS": "published",
    "load_benchmarks": "published",
}
# former names, for one release
_RENAMED = {
    "Figure": ("evaluation.metrics", "Estimate"),
    "embedder": ("inference", "SugarEmbedder"),
    "generator": ("inference", "SugarGenerator"),
}

__all__ = list(_MODULE_OF)


def __getattr__(name: str):
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"hf_sugar.evaluation.{_MODULE_OF[name]}"), name)
    if name in _RENAMED:
        module, name = _RENAMED[name]
        return getattr(importlib.import_module(f"hf_sugar.{module}"), name)
    raise AttributeError(f"module 'hf_sugar.evaluation' has no attribute '{name}'")


def __dir__():
    return __all__
