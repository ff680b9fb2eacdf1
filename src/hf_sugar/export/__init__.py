"""Checkpoints for other programs: [`export_sentence_transformers`], and of the model itself `export_backbone` (the plain
checkpoint of the backbone's own class) and `export_adapter` (LoRA weights for it)."""

from .sentence_transformers import export_sentence_transformers


__all__ = ["export_sentence_transformers"]
