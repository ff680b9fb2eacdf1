"""The model, its configuration and its processor. Touching one of them registers all with the Auto classes of transformers;
`rows_sugar` alone does not need torch."""

import importlib


__all__ = ["SugarConfig", "SugarForConditionalGeneration", "SugarOutput", "SugarProcessor"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module 'hf_sugar.models' has no attribute '{name}'")
    return getattr(importlib.import_module("hf_sugar.models.auto"), name)
