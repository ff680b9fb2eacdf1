"""Search among embedded items, and answers that draw on what was found."""

from .documents import find_files
from .embedding import SugarEmbedder
from .index import Hit, SugarIndex
from .lance import LanceIndex
from .rag import (
    RAG,
    RAGAnswer,
    RAGPrompt,
    find_examples,
    question_slices,
    rag_generator,
    rag_messages,
    split_answer,
)


__all__ = [
    "RAG",
    "Hit",
    "LanceIndex",
    "RAGAnswer",
    "RAGPrompt",
    "SugarEmbedder",
    "SugarIndex",
    "find_examples",
    "find_files",
    "question_slices",
    "rag_generator",
    "rag_messages",
    "split_answer",
]
