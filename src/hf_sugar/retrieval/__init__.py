"""Search among embedded items, and answers that draw on what was found. Names are imported when they are first touched:
FAISS is not loaded by what only generates."""

import importlib


_MODULE_OF = {
    "Hit": "base",
    "Index": "base",
    "LanceIndex": "lance",
    "SugarIndex": "index",
    "find_files": "documents",
    "RAGAnswer": "rag",
    "RAGPrompt": "rag",
    "SugarRAG": "rag",
    "find_examples": "rag",
    "mine_negatives": "mine",
    "question_slices": "rag",
    "rag_generator": "rag",
    "rag_messages": "rag",
    "split_answer": "rag",
}

__all__ = list(_MODULE_OF)


def __getattr__(name: str):
    if name == "RAG":  # former name of `SugarRAG`, for one release
        name = "SugarRAG"
    if name == "SugarEmbedder":  # moved to `hf_sugar.inference`
        return importlib.import_module("hf_sugar.inference").SugarEmbedder
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'hf_sugar.retrieval' has no attribute '{name}'")
    return getattr(importlib.import_module(f"hf_sugar.retrieval.{_MODULE_OF[name]}"), name)


def __dir__():
    return __all__
