"""The model in other projects' harnesses, each with a task of its own that needs no network."""

import pytest
import tiny
from datasets import Dataset, Features, Image, Value

from hf_sugar.evaluation import recall_at_k
from hf_sugar.inference import SugarEmbedder
from hf_sugar.models import SugarForConditionalGeneration, SugarProcessor
from hf_sugar.retrieval import SugarIndex
from hf_sugar.world import checkpoint, load_world


pytestmark = pytest.mark.extras
SIZE = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    place = tmp_path_factory.mktemp("harness")
    tiny.llava().save_pretrained(place)
    tiny.processor().save_pretrained(place)
    model = SugarForConditionalGeneration.from_pretrained(place, retrieval_dim=16).eval()
    return model, SugarProcessor.from_pretrained(place)


@pytest.fixture(scope="module")
def world():
    rows = load_world("captions", "test", SIZE, image_size=28)
    return [row["images"][0] for row in rows], [row["messages"][0]["content"][1]["text"] for row in rows]


def retrieval(category, queries, corpus):
    """A task of mteb whose query n is answered by document n."""
    mteb = pytest.importorskip("mteb", reason="needs mteb")
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    class Task(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="WorldRetrieval",
            description="Pictures and captions of the rendered world.",
            dataset={"path": "local/world", "revision": "1"},
            type="Any2AnyRetrieval",
            category=category,
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="recall_at_1",
            modalities=["text", "image"],
        )

        def load_data(self, **kwargs):
            ids = [str(n) for n in range(SIZE)]
            self.dataset = {
                "default": {
                    "test": {
                        "queries": Dataset.from_dict({"id": ids, **queries}),
                        "corpus": Dataset.from_dict({"id": ids, **corpus}),
                        "relevant_docs": {n: {n: 1} for n in ids},
                        "top_ranked": None,
                    }
                }
            }
            self.data_loaded = True

    def run(model, **settings):
        from hf_sugar.evaluation.harness_mteb import MTEBModel

        results = mteb.evaluate(MTEBModel(*model, **settings), Task(), cache=None)
        return results.task_results[0].scores["test"][0]

    return run


def test_mteb(model, world):
    images, texts = world
    turned, embed = images[1:] + images[:1], SugarEmbedder(*model)
    pairs, other = ([list(pair) for pair in zip(shown, texts, strict=True)] for shown in (images, turned))
    for category, queries, corpus, items in (
        ("i2t", {"image": images}, {"text": texts}, (images, texts)),
        ("t2i", {"text": texts}, {"image": images}, (texts, images)),
        ("it2it", {"image": turned, "text": texts}, {"image": images, "text": texts}, (other, pairs)),
    ):
        scores = retrieval(category, queries, corpus)(model)
        found = recall_at_k(embed(items[0]) @ embed(items[1]).T, list(range(SIZE)), ks=(1, 3, 5, 10))
        for k, hits in found.items():
            assert scores[f"recall_at_{k}"] == pytest.approx(hits.mean(), abs=1e-4), category
    short = SugarEmbedder(*model, truncate_dim=3)
    found = recall_at_k(short(texts) @ short(images).T, list(range(SIZE)), ks=(5,))[5]
    scores = retrieval("t2i", {"text": texts}, {"image": images})(model, truncate_dim=3)
    assert scores["recall_at_5"] == pytest.approx(found.mean(), abs=1e-4)
    config = model[0].config
    config.query_instruction, config.document_instruction = "Find the picture.", "A picture."
    scores = retrieval("t2i", {"text": texts}, {"image": images})(model)
    found = recall_at_k(embed(texts, "query") @ embed(images, "document").T, list(range(SIZE)), ks=(1, 3, 5, 10))
    plain = recall_at_k(embed(texts) @ embed(images).T, list(range(SIZE)), ks=(1, 3, 5, 10))
    config.query_instruction = config.document_instruction = None
    for k, hits in found.items():
        assert scores[f"recall_at_{k}"] == pytest.approx(hits.mean(), abs=1e-4)
    assert any((hits != plain[k]).any() for k, hits in found.items())
    # the very picture with its caption is found; pictures alone, so that nothing but them can tell the documents apart
    same = {"image": images, "text": texts}
    assert retrieval("it2it", same, same)(model)["recall_at_1"] == 1
    assert retrieval("i2i", {"image": turned}, {"image": images})(model)["recall_at_1"] == 0


TASK = """
task: world_facts
dataset_path: parquet
dataset_kwargs:
  data_files: {{test: "{data}"}}
test_split: test
output_type: generate_until
doc_to_messages: !function facts.messages
doc_to_visual: !function facts.images
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 6, temperature: 0, until: ["\\n"]}}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
FUNCTIONS = """
def images(doc):
    return [doc["image"].convert("RGB")]


def messages(doc, lmms_eval_specific_kwargs=None):
    content = [{"type": "image", "url": images(doc)[0]}, {"type": "text", "text": doc["question"]}]
    return [{"role": "user", "content": content}]
"""


def test_lmms_eval_with_retrieval(tmp_path):
    evaluator = pytest.importorskip("lmms_eval.evaluator", reason="needs lmms-eval")
    from lmms_eval.tasks import TaskManager

    model = SugarForConditionalGeneration.from_backbone(checkpoint("llava"), retrieval_dim=32).float().eval()
    processor = SugarProcessor.from_pretrained(checkpoint("llava"))
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    rows = [
        {**row, "messages": row["messages"][:2], "images": row["images"][:1]}
        for row in load_world("facts", "test", SIZE)
    ]
    SugarIndex.build(rows, SugarEmbedder(model, processor), directory=tmp_path / "index")
    # the very pictures of the index, so that an untrained retrieval head finds them; other ids, so that it may
    Dataset.from_dict(
        {
            "image": [row["images"][0] for row in rows],
            "question": [row["messages"][0]["content"][1]["text"] for row in rows],
            "answer": [row["messages"][1]["content"][0]["text"] for row in rows],
        },
        features=Features({"image": Image(), "question": Value("string"), "answer": Value("string")}),
    ).to_parquet(tmp_path / "facts.parquet")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "facts.yaml").write_text(TASK.format(data=tmp_path / "facts.parquet"))
    (tmp_path / "tasks" / "facts.py").write_text(FUNCTIONS)

    def exact_match(arguments):
        results = evaluator.simple_evaluate(
            model="hf_sugar",  # found by its entry point
            model_args=f"pretrained={tmp_path / 'model'},dtype=float32{arguments}",
            tasks=["world_facts"],
            task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
            batch_size=1,
        )
        return results["results"]["world_facts"]["exact_match,none"]

    assert exact_match(f",index={tmp_path / 'index'}") == 1
    assert exact_match("") < 0.6  # guesses one of eight colours
