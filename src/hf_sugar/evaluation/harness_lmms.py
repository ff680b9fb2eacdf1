"""Retrieval-augmented answers as a model of lmms-eval, which finds it by the entry point `lmms_eval.models`."""

from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm.auto import tqdm

from ..distributed import distributed_state
from ..inference import SugarEmbedder
from ..models import SugarForConditionalGeneration, SugarProcessor
from ..retrieval import SugarIndex, SugarRAG
from ..retrieval.storage import stored_truncate_dim


class LmmsModel(lmms):
    """
    `--model hf_sugar` of lmms-eval: every question is answered with the most similar answered questions of an index.

    Args:
        pretrained (`str`): Full checkpoint or adapter: a directory or a Hub id.
        index (`str`, *optional*): Directory of an index of answered questions. Without one the model answers alone.
        k (`int`, *optional*, defaults to `1`): Examples before a question.
        dtype (`str`, *optional*, defaults to `"auto"`): Precision of the model.
        batch_size, device: Passed by lmms-eval. One question is answered at a time, on the device of the process.
    """

    is_simple = False

    def __init__(
        self, pretrained: str, index: str | None = None, k: int = 1, dtype: str = "auto", batch_size=None, device=None
    ):
        super().__init__()
        state = distributed_state()
        self._rank, self._world_size = state.process_index, state.num_processes
        model = SugarForConditionalGeneration.from_pretrained(pretrained, dtype=dtype).to(state.device).eval()
        processor = SugarProcessor.from_pretrained(pretrained)
        found = None
        if index is not None:
            embed = SugarEmbedder(model, processor, truncate_dim=stored_truncate_dim(index))
            found = SugarIndex.load(index, embed=embed)
        self.rag = SugarRAG(model, processor, found, int(k))

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answers, in the order of the requests."""
        defaults = dict(self.rag.generation_kwargs)
        answers = []
        for request in tqdm(requests, desc="Answers", disable=self._rank != 0):
            context, doc_to_messages, settings, doc_id, task, split = request.args
            row = _row(doc_to_messages(self.task_dict[task][split][doc_id]))
            self.rag.generation_kwargs = defaults | _generation_kwargs(settings)
            answer = self.rag.answer(row)
            until = settings.get("until") or []
            for stop in [until] if isinstance(until, str) else until:
                answer = answer.split(stop)[0] if stop else answer
            answers.append(answer.strip())
            self.cache_hook.add_partial("generate_until", (context, settings), answers[-1])
        self.rag.generation_kwargs = defaults
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("Answers with retrieval are generated. Choose tasks of output_type generate_until.")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError("Answers with retrieval are to one question. Choose tasks of one round.")


def _row(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """Messages of lmms-eval, whose parts hold their media under `url`, in the conversational vision format."""
    rows, images = [], []
    for message in messages:
        content = []
        for part in message["content"]:
            if part["type"] == "image":
                images.append(part["url"])
            elif part["type"] != "text":
                raise ValueError(f"A Sugar model takes texts and images; this task has {part['type']}.")
            text = part["text"].strip() if part["type"] == "text" else None
            if text != "":
                content.append({"type": part["type"], "text": text})
        rows.append({"role": message["role"], "content": content})
    return {"messages": rows, "images": images}


def _generation_kwargs(settings: dict[str, Any]) -> dict[str, Any]:
    """What of a task's settings `generate` takes; a temperature of zero is greedy decoding."""
    sampled = bool(settings.get("do_sample", True)) and bool(settings.get("temperature"))
    names = ("max_new_tokens", "num_beams") + (("temperature", "top_p") if sampled else ())
    return {"do_sample": sampled, **{name: settings[name] for name in names if settings.get(name) is not None}}


MANIFEST = ModelManifest("hf_sugar", chat_class_path="hf_sugar.evaluation.harness_lmms.LmmsModel")
