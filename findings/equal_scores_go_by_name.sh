#!/usr/bin/env bash
# mteb (2.26.24), a retrieval task in which five documents are equally close to each query, and one of them is right: with vectors
# of a few bits, or of a model that has collapsed, such ties are everywhere. Which of the five comes first is neither chance nor
# their order but their names, compared as texts, the greatest first: hit_rate_at_1 is 100 where the right one is called 9 and the
# others 10 to 13, and 0 where it is called 10 and another 9. (trec_eval's rule, through pytrec_eval.)
. "$(dirname "$0")/environment.sh" torch==2.13.0 transformers==5.23.0 mteb==2.26.24 numpy==2.4.6
python - <<'P' 2> /dev/null
import mteb
import numpy as np
from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction

QUERIES = 20


def task(names):
    """The first of the names is that of the right one."""

    class Ties(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="TiesRetrieval", description="Five equal documents for each query.", type="Retrieval",
            dataset={"path": "local/ties", "revision": "1"}, category="t2t", eval_splits=["test"],
            eval_langs=["eng-Latn"], main_score="hit_rate_at_1", modalities=["text"],
        )

        def load_data(self, **kwargs):
            documents = {f"{query}-{name}": str(query) for query in range(QUERIES) for name in names}
            queries = {"id": [f"q{n}" for n in range(QUERIES)], "text": [str(n) for n in range(QUERIES)]}
            self.dataset = {"default": {"test": {
                "queries": Dataset.from_dict(queries),
                "corpus": Dataset.from_dict({"id": list(documents), "text": list(documents.values())}),
                "relevant_docs": {f"q{n}": {f"{n}-{names[0]}": 1} for n in range(QUERIES)},
                "top_ranked": None,
            }}}
            self.data_loaded = True

    return Ties()


class Model(AbsEncoder):
    def __init__(self):
        self.mteb_model_meta = ModelMeta.create_empty(overwrites={
            "name": "local/model", "revision": "1", "similarity_fn_name": ScoringFunction.COSINE, "modalities": ["text"]})

    def encode(self, inputs, **kwargs):
        return np.eye(QUERIES, dtype=np.float32)[[int(text.split()[-1]) for batch in inputs for text in batch["text"]]]


def hits(*names):
    scores = mteb.evaluate(Model(), task(names), cache=None, overwrite_strategy="always").task_results[0].scores["test"][0]
    print(f"the right one is called {names[0]}, the others {', '.join(names[1:])}: {100 * scores['hit_rate_at_1']:.0f}")
    return 100 * scores["hit_rate_at_1"]


assert hits("9", "10", "11", "12", "13") == 100
assert hits("10", "9", "11", "12", "13") == 0
assert hits("b", "a", "c", "d", "e") == 0 and hits("e", "a", "b", "c", "d") == 100
P
