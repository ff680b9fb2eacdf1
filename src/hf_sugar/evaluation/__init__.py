"""Retrieval and answering tasks, their metrics with confidence intervals, and plots."""

from .benchmarks import BENCHMARKS, load_benchmarks
from .metrics import Figure, bootstrap_interval, ranks, recall_at_k, report_table, to_dict
from .plots import plot_alignment, plot_curves, plot_gallery, plot_losses, plot_similarities
from .tasks import (
    WINOGROUND_CHANCE,
    embedder,
    exact_match,
    generator,
    image_text_retrieval,
    interleaved_retrieval,
    winoground,
)


__all__ = [
    "BENCHMARKS",
    "WINOGROUND_CHANCE",
    "Figure",
    "bootstrap_interval",
    "embedder",
    "exact_match",
    "generator",
    "image_text_retrieval",
    "interleaved_retrieval",
    "load_benchmarks",
    "plot_alignment",
    "plot_curves",
    "plot_gallery",
    "plot_losses",
    "plot_similarities",
    "ranks",
    "recall_at_k",
    "report_table",
    "to_dict",
    "winoground",
]
