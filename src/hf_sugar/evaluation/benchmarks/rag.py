from typing import Any, ClassVar

from ...data.readers import load_data
from ...data.rows import row_name
from ...retrieval.index import SugarIndex
from ...retrieval.rag import rag_generator
from ..metrics import Figure
from ..tasks import EmbedFunction, GenerateFunction, exact_match


class RagGain:
    """
    What retrieval adds: exact match of the answers with the most similar answered questions of a knowledge base before
    each question, without them, and the difference. A row of the knowledge base with the `id` of the question is not
    shown.

    Args:
        questions (source):
            Conversations that end with an answer, as [`hf_sugar.data.load_data`] takes them.
        knowledge (source):
            Answered questions to search, the same way.
        k (`int`, *optional*, defaults to `1`):
            Examples before a question.
        split (`str`, *optional*, defaults to `"test"`):
            Split of sources that have several and do not name one.

    Raises:
        `FileNotFoundError`: if a source does not exist.
        `ValueError`: if a row is malformed, or a question has no answer.
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

    def run(self, embed: EmbedFunction, generate: GenerateFunction) -> dict[str, Figure | int]:
        index = SugarIndex.build(self.knowledge, embed, by="question", progress=True)
        retrieve = rag_generator(generate, index, self.k)
        results, hits = {}, {}
        for name, answer in (("without", generate), ("with", retrieve)):
            found = exact_match(answer, self.questions)
            results[f"exact_match_{name}_retrieval"] = found["exact_match"]
            missed = {miss["row"] for miss in found["misses"]}
            hits[name] = [row_name(row, n) not in missed for n, row in enumerate(self.questions.select_columns("id"))]
        gain = [int(b) - int(a) for a, b in zip(hits["without"], hits["with"], strict=True)]
        return {**results, "gain": Figure.from_hits(gain), "knowledge_rows": len(self.knowledge)}
