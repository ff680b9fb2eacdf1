"""One embedder and one generator of a model, for the index, evaluation, the trainer, the harnesses and the demo."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import jinja2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm.auto import tqdm
from transformers import BatchFeature, StoppingCriteriaList, TextIteratorStreamer

from .data import load_image
from .data.images import image_size
from .models.fingerprint_sugar import fingerprint
from .models.rows_sugar import as_row, check_row, fill_images, instructed, row_name, row_text


logger = logging.getLogger(__name__)


def require_sizes(**sizes: int | None) -> None:
    """A `ValueError` names the size that is below 1; `None` is none."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"`{name}` is {size}; it must be 1 or more.")


def require_several(name: str, items: Any) -> None:
    """A `TypeError` if what should be several items is a single one."""
    if isinstance(items, str | dict | Path | Image.Image):
        raise TypeError(f"`{name}` is a single {type(items).__name__}. Put it in a list.")


class SugarEmbedder:
    """
    Embedding function of a model: called with items, it returns their embeddings.

    Items of similar length share a batch, and where they differ nothing is computed for padding, see
    [`~models.packing_sugar.lay_rows`]. Of a lazily decoded column of a dataset only some images are in memory.

    Args:
        model ([`SugarForConditionalGeneration`]), processor ([`SugarProcessor`]):
            What embeds. The model is in evaluation mode meanwhile, and in its former mode afterwards.
        batch_size (`int`, *optional*, defaults to `32`): Items in one forward pass.
        project (`bool`, *optional*, defaults to `True`):
            Whether to use the retrieval projector. Without it the embedding is the pooled hidden state, the baseline for
            a checkpoint whose projector is not trained.
        pooling (`str`, *optional*, defaults to `"slice"`):
            `"slice"` for the last slice, as trained, or `"mean"` for all tokens of the item, another baseline.
        progress (`bool`, *optional*, defaults to `False`): Whether to show a bar.
        max_batch_tokens (`int`, *optional*):
            About the most tokens in one forward pass, with images expanded, chat template and instruction: what a template
            puts between parts, some tokens each, is not counted. Of longer items each is a batch of its own. At most
            `batch_size` items share a pass all the same.
        truncate_dim (`int`, *optional*):
            Length to which embeddings are cut, see [`~SugarForConditionalGeneration.project_slices`].

    Example:

    ```python
    >>> embed = SugarEmbedder(model, processor)
    >>> embed(["a red circle", image, [Path("photo.jpg"), "What is this?"]]).shape
    (3, 128)
    ```
    """

    def __init__(
        self,
        model: torch.nn.Module,
        processor: Any,
        batch_size: int = 32,
        project: bool = True,
        pooling: str = "slice",
        progress: bool = False,
        max_batch_tokens: int | None = None,
        truncate_dim: int | None = None,
    ):
        if pooling not in ("slice", "mean"):
            raise ValueError(f"`pooling` is {pooling!r}; use 'slice' or 'mean'.")
        if pooling == "mean" and model.config.image_pooling != "mean":
            raise ValueError("`pooling='mean'` needs a model with `image_pooling='mean'`.")
        require_sizes(batch_size=batch_size, max_batch_tokens=max_batch_tokens)
        self.model, self.processor, self.batch_size = model, processor, batch_size
        self.project, self.pooling, self.progress = project, pooling, progress
        whole = model.config.retrieval_dim if project else model.config.get_text_config().hidden_size
        if truncate_dim is not None and not 0 < truncate_dim <= whole:
            raise ValueError(f"`truncate_dim` is {truncate_dim}; it must be from 1 to {whole}.")
        if project and model.config.random_projector:
            logger.warning(
                "The retrieval projector is random: train the model, or embed with `project=False`. After a training of your "
                "own, set `model.config.random_projector = False`."
            )
        self.truncate_dim, self.max_batch_tokens = truncate_dim, max_batch_tokens
        self.dim: int = truncate_dim or whole  # of the embeddings

    @cached_property
    def fingerprint(self) -> str:
        """`str`: samples of the weights, see [`~models.fingerprint_sugar.fingerprint`]."""
        trained = self.project and self.pooling == "slice"
        how = "" if trained else f"#pooling={self.pooling}#project={self.project}"
        how += f"#truncate_dim={self.truncate_dim}" if self.truncate_dim else ""
        if instruction := self.instruction("document"):
            how += f"#document_instruction={instruction}"
        return fingerprint(self.model, adapters=True) + how

    def instruction(self, role: str | None) -> str | None:
        """What the model's configuration says to it before a `"query"` or a `"document"`."""
        if role not in (None, "query", "document"):
            raise ValueError(f"`role` is {role!r}; use 'query' or 'document'.")
        return role and getattr(self.model.config, f"{role}_instruction")

    def __call__(self, items: Sequence[Any], role: str | None = None) -> np.ndarray:
        """Embeddings of whole items, each as [`~models.rows_sugar.as_row`] takes it: float32 of shape `(items, dim)`, L2-normalised.
        `role` may be `"query"` or `"document"`, for the instruction of the model's configuration, if it has one.
        A `TypeError` for another type or a single item; a `ValueError` that names an item which is empty, damaged or too long
        for the model, or whose embedding is not finite, and for no items."""
        return np.stack([embeddings[-1] for embeddings in self.every_slice(items, role=role)])

    @torch.no_grad()
    def every_slice(
        self,
        items: Sequence[Any],
        errors: dict[int, ValueError] | None = None,
        names: Sequence[str] | None = None,
        lengths: dict[int, int] | None = None,
        role: str | None = None,
    ) -> list[np.ndarray]:
        """
        Embeddings of all prefixes of items that end with a slice, from one forward pass: of shape `(slices, dim)` for each
        item, of which the last is that of the whole item.

        Args:
            items (`Sequence`): As for whole items, with the same errors.
            errors (`dict[int, ValueError]`, *optional*):
                Where to put what is wrong with which item, whose embeddings are `None` then.
            names (`Sequence[str]`, *optional*): What errors call the items; by default `item 0` and so on.
            lengths (`dict[int, int]`, *optional*): Where to put how many tokens each item has.
            role (`str`, *optional*): As for whole items.
        """
        instruction = self.instruction(role)
        require_several("items", items)
        if len(items) == 0:
            raise ValueError("There are no items to embed.")
        names = names or [f"item {n}" for n in range(len(items))]

        def read(n: int) -> dict[str, Any] | None:
            try:
                return as_row(items[n], names[n])
            except ValueError as error:
                if errors is None:
                    raise
                errors[n] = error
                return None

        result: list[Any] = [None] * len(items)
        with _evaluating(self.model):
            most = self.max_batch_tokens and (self.max_batch_tokens, *self._unsaid(instruction))
            for rows in _batches(self, len(items), read, "Embedding", most):
                rows, inputs = self._inputs(rows, names, errors, instruction)
                if rows:
                    if lengths is not None:
                        lengths.update(zip(rows, inputs["attention_mask"].sum(dim=1).tolist(), strict=True))
                    for n, embeddings in zip(rows, self._forward(inputs, [names[n] for n in rows]), strict=True):
                        result[n] = embeddings
        return result

    def _unsaid(self, instruction: str | None) -> tuple[int, int]:
        """Tokens of the chat template around a message, and what the instruction adds to an item."""
        counts = [self.processor.embed_inputs(["a"], instruction=i)["input_ids"].shape[1] for i in (None, instruction)]
        return counts[0] - self.processor.count_tokens(["a"], [[]])[0], counts[1] - counts[0]

    def _inputs(
        self,
        rows: dict[int, dict[str, Any]],
        names: Sequence[str],
        errors: dict[int, ValueError] | None,
        instruction: str | None,
    ) -> tuple[dict[int, dict[str, Any]], BatchFeature | None]:
        """The rows that can be encoded, and their inputs. Where a batch cannot be, each row is tried alone."""
        limit = self.model.config.get_text_config().max_position_embeddings
        called = [names[n] for n in rows]
        try:
            conversations = [_filled(row, name) for row, name in zip(rows.values(), called, strict=True)]
            conversations = [instructed(messages, instruction) for messages in conversations]
            return rows, self.processor.encode_conversations(conversations, names=called, max_length=limit)
        except ValueError as error:
            if errors is None:
                raise
            if len(rows) == 1:
                errors[next(iter(rows))] = error
                return {}, None
            good = {n: row for n, row in rows.items() if self._inputs({n: row}, names, errors, instruction)[0]}
            if len(good) == len(rows):
                raise
            return self._inputs(good, names, errors, instruction) if good else ({}, None)

    def _forward(self, inputs: BatchFeature, names: list[str]) -> list[np.ndarray]:
        inputs = inputs.to(self.model.device, dtype=self.model.dtype)
        if self.pooling == "mean":
            inputs["slice_ids"] = inputs["attention_mask"].long() - 1
        embeddings, mask = self.model.embed_slices(**inputs, project=self.project, truncate_dim=self.truncate_dim)
        embeddings = embeddings.float().cpu().numpy()
        _require_finite("embedding", embeddings, names, self.model.dtype)
        return [row[:count] for row, count in zip(embeddings, mask.sum(dim=1).tolist(), strict=True)]


def in_role(embed: Callable[..., np.ndarray], role: str) -> Callable[[Sequence[Any]], np.ndarray]:
    """An embedding function for items that are a `"query"` or a `"document"`; itself, where nothing is said to it."""
    return partial(embed, role=role) if isinstance(embed, SugarEmbedder) and embed.instruction(role) else embed


class SugarGenerator:
    """
    Generating function of a model: called with conversations, it returns the answers.

    Args:
        model ([`SugarForConditionalGeneration`]), processor ([`SugarProcessor`]):
            What answers. The model is in evaluation mode meanwhile, and in its former mode afterwards.
        batch_size (`int`, *optional*, defaults to `32`):
            Conversations generated together, padded on the left. Those of similar length share a batch.
        max_new_tokens (`int`, *optional*, defaults to `128`): Longest answer.
        progress (`bool`, *optional*, defaults to `False`): Whether to show a bar.
        generation_kwargs: Passed on to `model.generate`. Decoding is greedy unless `do_sample` says otherwise.

    Example:

    ```python
    >>> generate = SugarGenerator(model, processor, max_new_tokens=64)
    >>> question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
    >>> generate([{"messages": [question], "images": [image]}])
    ['A red circle.']
    ```
    """

    def __init__(
        self,
        model: torch.nn.Module,
        processor: Any,
        batch_size: int = 32,
        max_new_tokens: int = 128,
        progress: bool = False,
        **generation_kwargs: Any,
    ):
        require_sizes(batch_size=batch_size, max_new_tokens=max_new_tokens)
        self.model, self.processor, self.batch_size, self.progress = model, processor, batch_size, progress
        self.generation_kwargs = {"do_sample": False, "max_new_tokens": max_new_tokens, **generation_kwargs}
        self.max_length = model.config.get_text_config().max_position_embeddings

    @torch.no_grad()
    def __call__(self, conversations: Sequence[dict[str, Any]]) -> list[str]:
        """Answers to conversations, rows in the conversational vision format whose last turn is the user's: only new tokens,
        without special tokens. A `ValueError` names the row that is malformed, too long, or refused by the chat template."""
        require_several("conversations", conversations)
        answers, read = [""] * len(conversations), conversations.__getitem__
        with _evaluating(self.model):
            for rows in _batches(self, len(conversations), read, "Generating"):
                names = [row_name(row, n) for n, row in rows.items()]
                inputs = self.inputs(list(rows.values()), names, self.max_length)
                sequences = self.model.generate(**inputs, **self.generation_kwargs)
                new_tokens = sequences[:, inputs["input_ids"].shape[1] :]
                decoded = self.processor.batch_decode(new_tokens, skip_special_tokens=True)
                for n, answer in zip(rows, decoded, strict=True):
                    answers[n] = answer.strip()
        return answers

    def inputs(
        self,
        conversations: Sequence[dict[str, Any]],
        names: Sequence[str] | None = None,
        max_length: int | None = None,
    ) -> BatchFeature:
        """Inputs of the model, on its device, padded on the left. Errors call the conversations `names`; more than
        `max_length` tokens are one."""
        names = names or [row_name(row, n) for n, row in enumerate(conversations)]
        filled = [_filled(row, name) for row, name in zip(conversations, names, strict=True)]
        for messages, name in zip(filled, names):
            self.processor.refuse_special_tokens(messages, name)
            if (last := messages[-1]["role"]) != "user":
                raise ValueError(f"{name}: the last turn is the {last}'s; there is nothing to answer.")
        try:
            inputs = self.processor.apply_chat_template(
                filled,
                tokenize=True,
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True, "padding_side": "left"},
            )
        except (ValueError, jinja2.TemplateError) as error:
            if len(filled) == 1:
                raise ValueError(f"{names[0]} cannot be put before the model: {error}") from error
            for row, name in zip(conversations, names, strict=True):
                self.inputs([row], [name])
            raise
        for name, length in zip(names, inputs["attention_mask"].sum(dim=1).tolist(), strict=True):
            if max_length is not None and length > max_length:
                raise ValueError(f"{name} has {length} tokens; the limit is {max_length}. Shorten it, or drop it.")
        return inputs.to(self.model.device, dtype=self.model.dtype)

    @torch.no_grad()
    def choose(
        self, conversations: Sequence[dict[str, Any]], answer: str, other: str, names: Sequence[str] | None = None
    ) -> np.ndarray:
        """How probable an answer is against another, by the first token in which they differ: float32 of shape
        `(conversations,)`. Conversations and errors are as for generating; errors call them `names`."""
        names = names or [row_name(row, n) for n, row in enumerate(conversations)]
        asked = {"messages": [{"role": "user", "content": "a"}]}
        encoded = [self._answered([asked], each, ["a"]) for each in (answer, other)]
        tokens = zip(*(each["input_ids"][each["labels"] != -100].tolist() for each in encoded), strict=False)
        place, tokens = next((n, pair) for n, pair in enumerate(tokens) if pair[0] != pair[1])
        margins = np.empty(len(conversations), np.float32)
        with _evaluating(self.model):
            read = conversations.__getitem__
            for rows in _batches(self, len(conversations), read, "Scoring"):
                inputs = self._answered(list(rows.values()), answer, [names[n] for n in rows])
                inputs = inputs.to(self.model.device, dtype=self.model.dtype)
                at = (inputs.pop("labels") != -100).int().argmax(dim=1) + place - 1
                kept, column = at.unique(return_inverse=True)
                if self.model.vlm._supports_logits_to_keep():  # the vocabulary is large, the sequences are long
                    inputs["logits_to_keep"] = kept
                else:
                    column = at
                logits = self.model(**inputs, use_cache=False).logits[torch.arange(len(at)), column].float()
                margins[list(rows)] = (logits[:, tokens[0]] - logits[:, tokens[1]]).cpu().numpy()
        _require_finite("score", margins, names, self.model.dtype)
        return torch.from_numpy(margins).sigmoid().numpy()

    @torch.no_grad()
    def likelihood(self, conversations: Sequence[dict[str, Any]], names: Sequence[str] | None = None) -> np.ndarray:
        """How probable the last slice of each conversation, a text, is after what stands before it: the geometric mean of the
        probabilities of its tokens, float32 of shape `(conversations,)`. Errors are as for generating."""
        names = names or [row_name(row, n) for n, row in enumerate(conversations)]
        scores = np.empty(len(conversations), np.float32)
        with _evaluating(self.model):
            for rows in _batches(self, len(conversations), conversations.__getitem__, "Scoring"):
                called = [names[n] for n in rows]
                turns = [_filled(row, name) for row, name in zip(rows.values(), called, strict=True)]
                inputs = self.processor.encode_conversations(turns, ["text"] * len(turns), called, self.max_length)
                slices, labels = inputs.pop("slice_ids"), inputs.pop("labels")
                place = torch.arange(labels.shape[1])
                before = (slices >= 0) & (slices < slices.amax(dim=1, keepdim=True))
                labels[place <= torch.where(before, place, -1).amax(dim=1, keepdim=True)] = -100
                kept = (labels[:, 1:] != -100).any(dim=0).nonzero()[:, 0]
                labels = labels[:, kept + 1].to(self.model.device)
                inputs = inputs.to(self.model.device, dtype=self.model.dtype)
                if self.model.vlm._supports_logits_to_keep():
                    logits = self.model(**inputs, use_cache=False, logits_to_keep=kept.to(labels.device)).logits
                else:
                    logits = self.model(**inputs, use_cache=False).logits[:, kept]
                losses = F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
                scores[list(rows)] = (-losses.sum(dim=1) / (labels != -100).sum(dim=1)).exp().cpu().numpy()
        _require_finite("score", scores, names, self.model.dtype)
        return scores

    def _answered(self, conversations: Sequence[dict[str, Any]], answer: str, names: Sequence[str]) -> BatchFeature:
        """Inputs of conversations with an answer, as training has them: `labels` are of that answer alone."""
        reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        turns = [[{**m, "learn": False} for m in _filled(r, n)] for r, n in zip(conversations, names, strict=True)]
        turns = [[*before, reply] for before in turns]
        inputs = self.processor.encode_conversations(turns, ["answers"] * len(turns), names, self.max_length)
        del inputs["slice_ids"]
        return inputs

    def stream(self, conversation: dict[str, Any], **generation_kwargs: Any) -> Iterator[str]:
        """Answer one conversation piece by piece, with `generation_kwargs` in place of those of the constructor. Generation
        ends when the iterator is closed."""
        inputs = self.inputs([conversation], max_length=self.max_length)
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        closed, errors = Event(), []
        stop = StoppingCriteriaList(
            [lambda ids, *_, **__: torch.full((len(ids),), closed.is_set(), device=ids.device)]
        )
        settings = {**self.generation_kwargs, **generation_kwargs, "stopping_criteria": stop}

        def generate() -> None:
            try:
                with _evaluating(self.model):
                    self.model.generate(**inputs, **settings, streamer=streamer)
            except BaseException as error:  # raised again by the thread that reads
                errors.append(error)
                streamer.end()

        thread = Thread(target=generate, daemon=True)
        thread.start()
        try:
            yield from (piece for piece in streamer if piece)
        finally:
            closed.set()
            thread.join()
        if errors:
            raise errors[0]


def _filled(row: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The messages of a row with its images, decoded, in their parts."""
    images = row.get("images") or []
    check_row(row, len(images), name, loss=False)
    return fill_images(row["messages"], [load_image(image, f"{name}, images[{n}]") for n, image in enumerate(images)])


def _require_finite(what: str, values: np.ndarray, names: Sequence[str], dtype: torch.dtype) -> None:
    for name, value in zip(names, values, strict=True):
        if not np.isfinite(value).all():
            raise ValueError(f"The {what} of {name} is not finite in {dtype}. Load the model in bfloat16 or float32.")


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _batches(
    user: SugarEmbedder | SugarGenerator,
    total: int,
    read: Callable[[int], dict[str, Any] | None],
    desc: str,
    most: tuple[int, int, int] | None = None,
) -> Iterator[dict[int, dict[str, Any]]]:
    """Rows by their numbers, those of similar length together. Of a long input some batches are read at a time. `most` are the
    most tokens of a batch, and how many more than it says each message and each row has."""
    with tqdm(total=total, desc=desc, disable=not user.progress) as bar:
        for start in range(0, total, 16 * user.batch_size):
            window = range(start, min(start + 16 * user.batch_size, total))
            rows = {n: row for n in window if (row := read(n)) is not None}
            bar.update(len(window) - len(rows))
            texts = [row_text(row) for row in rows.values()]
            sizes = [list(map(image_size, row.get("images") or [])) for row in rows.values()]
            lengths = dict(zip(rows, user.processor.count_tokens(texts, sizes) if rows else []))
            order = sorted(rows, key=lengths.__getitem__, reverse=True)  # running out of memory shows early
            while order:
                count = user.batch_size
                if most is not None:
                    tokens, of_message, of_row = most
                    longest = max(lengths[n] + of_message * len(rows[n]["messages"]) for n in order[:count]) + of_row
                    count = min(count, max(1, tokens // max(1, longest)))
                batch, order = order[:count], order[count:]
                yield {n: rows[n] for n in batch}
                bar.update(len(batch))
