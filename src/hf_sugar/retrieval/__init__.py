"""Search among embedded items, and answers that draw on what was found."""

from .index import Hit, SugarIndex
from .rag import answer_with_retrieval, question_slices, rag_generator, rag_messages, split_answer


__all__ = [
    "Hit",
    "SugarIndex",
    "answer_with_retrieval",
    "question_slices",
    "rag_generator",
    "rag_messages",
    "split_answer",
]
