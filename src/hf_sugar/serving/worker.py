"""The one thread that owns the model. What waits for it is embedded or answered together."""

import logging
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from threading import Condition, Thread
from typing import Any

import torch
from transformers import StoppingCriteriaList

from ..inference import SugarEmbedder, SugarGenerator


logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Answer:
    """
    An answer in the making.

    Args:
        row (`dict[str, Any]`): The conversation, which [`SugarRAG.prompt`] let through.
        max_tokens (`int`): Longest answer.
        sampling (`dict[str, Any]`): For `model.generate`. Only answers of the same sampling are made together.
        seed (`int`, *optional*): Of the sampling; such an answer is made alone, or it would depend on its company.
        stop (`list[str]`): Texts before which the answer ends.
        deadline (`float`): Time (`time.monotonic`) at which it ends in any case.
        put (`Callable`, *optional*): Takes the text piece by piece, in the thread of the model.
    """

    row: dict[str, Any]
    max_tokens: int
    sampling: dict[str, Any]
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    deadline: float = float("inf")
    put: Callable[[str], Any] | None = None
    closed: bool = False  # nobody waits for it any more
    prompt_tokens: int = 0
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None

    def add(self, token: int, ends: list[int], decode: Callable[..., str]) -> None:
        """Take the next token. The text, without space around it, is the one that [`SugarGenerator`] gives."""
        self.tokens.append(token)
        if token in ends:
            self.finish_reason = "stop"
        elif self.closed or len(self.tokens) >= self.max_tokens or time.monotonic() > self.deadline:
            self.finish_reason = "length"
        elif self.put is None and not self.stop:
            return  # the text can wait for the end
        text = decode(self.tokens, skip_special_tokens=True)
        if found := [at for stop in self.stop if (at := text.find(stop)) >= 0]:
            text, self.finish_reason = text[: min(found)], "stop"
        elif self.finish_reason is None:  # what the next token may change: half a character, half a stop
            text = text.rstrip("\ufffd")
            begun = [n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n])]
            text = text[: len(text) - max(begun, default=0)]
        piece = text.strip()[len(self.text) :]
        self.text += piece
        if piece and self.put is not None:
            self.put(piece)


class _Job(Future):
    def __init__(self, run: Callable, key: Hashable, value: Any):
        super().__init__()
        self.run, self.key, self.value = run, key, value


class ModelWorker:
    """
    Owns a model and its processor in a thread of its own: neither is used by two requests at a time. The futures of its
    methods raise a `ValueError` for a mistake in the request, a `RuntimeError` for anything else.

    Args:
        embedder ([`SugarEmbedder`]): What embeds; its model answers. Its `batch_size` is that of both.
        observe (`Callable[[str, int], None]`): Is told the kind and size of every batch.
    """

    def __init__(self, embedder: SugarEmbedder, observe: Callable[[str, int], Any]):
        self.embedder, self.generator = embedder, SugarGenerator(embedder.model, embedder.processor)
        self.observe, self.stopping, self.waiting, self._changed = observe, False, [], Condition()
        Thread(target=self._work, name="model", daemon=True).start()

    def embed(self, item: Any, name: str, role: str | None = None) -> Future:
        """Embedding of an item as [`SugarEmbedder`] takes it, and the number of its tokens. Errors call it `name`."""
        return self._submit(self._embed, ("embed", role), (item, name))

    def answer(self, answer: Answer) -> Future:
        """The answer, finished."""
        alone = answer.seed is not None and answer.sampling["do_sample"]
        return self._submit(self._answer, object() if alone else tuple(answer.sampling.items()), answer)

    def call(self, function: Callable, *args: Any) -> Future:
        """What a function that uses the model returns."""
        return self._submit(self._call, object(), (function, args))

    def stop(self) -> None:
        """End the answers that are running where they are, and refuse the rest."""
        self.stopping = True

    def _submit(self, run: Callable, key: Hashable, value: Any) -> Future:
        job = _Job(run, key, value)
        with self._changed:
            self.waiting.append(job)
            self._changed.notify()
        return job

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.waiting)
                same = (job for job in self.waiting if job.key == self.waiting[0].key)
                taken = list(islice(same, self.embedder.batch_size))
                for job in taken:
                    self.waiting.remove(job)
            jobs = [job for job in taken if job.set_running_or_notify_cancel()]
            if not jobs:
                continue
            try:
                if self.stopping:
                    raise RuntimeError("The server is stopping.")
                self.observe(jobs[0].run.__name__.strip("_"), len(jobs))
                results = jobs[0].run(jobs)
            except Exception as error:
                # no mistake of a request: those are found one by one
                logger.error("%d requests failed.", len(jobs), exc_info=not self.stopping)
                results = [error if self.stopping else RuntimeError("The server failed; its log says why.")] * len(
                    jobs
                )
            for job, result in zip(jobs, results, strict=True):
                if not job.done():
                    (job.set_exception if isinstance(result, Exception) else job.set_result)(result)

    def _embed(self, jobs: list[_Job]) -> list[Any]:
        errors, lengths = {}, {}
        items, names = zip(*(job.value for job in jobs), strict=True)
        found = self.embedder.every_slice(items, errors, names, lengths, role=jobs[0].key[1])
        return [errors.get(n) or (found[n][-1], lengths[n]) for n in range(len(jobs))]

    def _call(self, jobs: list[_Job]) -> list[Any]:
        function, args = jobs[0].value
        try:
            return [function(*args)]
        except ValueError as error:
            return [error]

    def _answer(self, jobs: list[_Job]) -> list[Answer]:
        answers = [job.value for job in jobs]
        model, decode = self.generator.model, self.generator.processor.tokenizer.decode
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        inputs = self.generator.inputs([answer.row for answer in answers])
        for answer, length in zip(answers, inputs["attention_mask"].sum(dim=1).tolist(), strict=True):
            answer.prompt_tokens = length

        def step(ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            for job, answer, token in zip(jobs, answers, ids[:, -1].tolist(), strict=True):
                if answer.finish_reason is None:
                    answer.closed |= self.stopping
                    answer.add(token, ends, decode)
                    if answer.finish_reason is not None:
                        job.set_result(answer)
            return torch.tensor([answer.finish_reason is not None for answer in answers], device=ids.device)

        seed, longest = answers[0].seed, max(answer.max_tokens for answer in answers)
        settings = {
            **answers[0].sampling,
            "max_new_tokens": longest,
            "stopping_criteria": StoppingCriteriaList([step]),
        }
        devices = [model.device] if model.device.type == "cuda" else []
        with nullcontext() if seed is None else torch.random.fork_rng(devices):
            if seed is not None:
                torch.manual_seed(seed)
            model.generate(**inputs, **settings)
        return answers
