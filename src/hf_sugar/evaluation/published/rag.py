from typing import Any, ClassVar

import numpy as np

from ...data import load_data
from ...models.rows_sugar import row_name
from ...retrieval.index import SugarIndex
from ...retrieval.rag import rag_generator
from ..metrics import Estimate
from ..tasks import EmbedFunction, GenerateFunction, exact_match


class RagGain:
    """
    What retrieval adds: exact match of the answers with the most similar answered questions of a knowledge base before
    each question, without them, and the difference. Rows of the knowledge base that ask the same about the same pictures
    are not shown, so that a set can be its own knowledge base.

    Args:
        questions (source): Conversations that end with an answer, as [`hf_sugar.data.load_data`] takes them.
        knowledge (source): Answered questions to search, the same way.
        k (`int`, *optional*, defaults to `1`): Examples before a question.
        split (`str`, *optional*, defaults to `"test"`): Split of sources that have several and do not name one.
    """

    paper: ClassVar[dict[str, float]] = {}  # it reports VizWiz and ScienceQA, with their own measures
    axis: ClassVar[str] = ""

    def __init__(self, questions: Any, knowledge: Any, k: int = 1, split: str = "test"):
        self.questions, self.knowledge, self.k = load_data(questions, split), load_data(knowledge, split), k
        for n, row in enumerate(self.questions.remove_columns("images")):
            if not row["messages"] or row["messages"][-1]["role"] != "assistant":
                raise ValueError(
                    f"{row_name(row, n)} of `questions` does not end with an answer. Drop it, or add one."
                )

    def run(self, embed: EmbedFunction, generate: GenerateFunction) -> dict[str, Estimate | int]:
        index = SugarIndex.build(self.knowledge, embed, by="question", progress=True)
        results, hits = {}, {}
        for name, answer in (("without", generate), ("with", rag_generator(generate, index, self.k))):
            found = exact_match(answer, self.questions)
            results[f"exact_match_{name}_retrieval"] = found["exact_match"]
            hits[name] = np.ones(len(self.questions))
            hits[name][[miss["index"] for miss in found["misses"]]] = 0
        gain = Estimate.from_hits(hits["with"] - hits["without"])
        return {**results, "gain": gain, "knowledge_rows": len(self.knowledge)}
