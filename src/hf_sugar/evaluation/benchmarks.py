"""Former name of [`hf_sugar.evaluation.published`], for one release."""

from . import published
from .published import *  # noqa: F403


__path__ = published.__path__
