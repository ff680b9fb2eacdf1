"""Search among embedded items, and answers that draw on what was found. Names are imported when they are first touched:
FAISS is not loaded by what only generates."""

import importlib
from typing import TYPE_CHECKING


_NAMES = {
    ".base": "Hit Index",
    ".documents": "find_files",
    ".index": "SugarIndex",
    ".lance": "LanceIndex",
    ".mine": "mine_negatives",
    ".rag": "RAGPrompt SugarRAG find_examples question_slices rag_generator rag_messages split_answer",
    ".rerank": "RERANK_PROMPT SugarReranker rerank_row rerank_rows",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = list(_MODULE_OF)

if TYPE_CHECKING:  # the same for type checkers
    from .base import *
    from .documents import *
    from .index import *
    from .lance import *
    from .mine import *
    from .rag import *
    from .rerank import *


def __getattr__(name: str):
    name = "SugarRAG" if name == "RAG" else name  # former name, for one release
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'hf_sugar.retrieval' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULE_OF[name], __package__), name)


def __dir__():
    return __all__
