"""Search among embedded items, and answers that draw on what was found. Names are imported when they are first touched:
FAISS is not loaded by what only generates."""

import importlib


_MODULE_OF = {
    "Hit": ".base",
    "Index": ".base",
    "LanceIndex": ".lance",
    "RAGAnswer": ".rag",
    "RAGPrompt": ".rag",
    "SugarEmbedder": "..inference",  # its former place
    "SugarIndex": ".index",
    "SugarRAG": ".rag",
    "find_examples": ".rag",
    "find_files": ".documents",
    "mine_negatives": ".mine",
    "question_slices": ".rag",
    "rag_generator": ".rag",
    "rag_messages": ".rag",
    "split_answer": ".rag",
}

__all__ = list(_MODULE_OF)


def __getattr__(name: str):
    name = {"RAG": "SugarRAG"}.get(name, name)  # former name, for one release
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'hf_sugar.retrieval' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULE_OF[name], __package__), name)


def __dir__():
    return __all__
