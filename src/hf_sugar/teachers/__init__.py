"""Frozen slice encoders for the labels of structure-induced training, and their embeddings as a column of a dataset."""

from .encoder import TripleEncoder
from .prepare import add_teacher_embeddings, check_same_teachers, teachers_of


__all__ = ["TripleEncoder", "add_teacher_embeddings", "check_same_teachers", "teachers_of"]
