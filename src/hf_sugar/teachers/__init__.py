"""Frozen slice encoders for the labels of structure-induced training, and a cache of what they computed."""

from .cache import TeacherCache, slice_key
from .encoder import TripleEncoder


__all__ = ["TeacherCache", "TripleEncoder", "slice_key"]
