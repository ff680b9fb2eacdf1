"""One embedder and one generator of a model, for the index, evaluation, the trainer, the harnesses and the demo."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from threading import Event, Thread
from typing import Any

import jinja2
import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import BatchFeature, StoppingCriteriaList, TextIteratorStreamer

from .data import load_image
from .models.fingerprint_sugar import fingerprint
from .models.rows_sugar import IMAGE_SUFFIXES, check_row, conversation_row, fill_images, row_name


logger = logging.getLogger(__name__)

TEXT_SUFFIXES = (".txt", ".md")


class ItemError(ValueError):
    """
    What is wrong with one item of a list.

    Args:
        message (`str`):
            The problem; it begins with `item <number>`.
        item (`int`):
            Position of the item.
    """

    def __init__(self, message: str, item: int):
        super().__init__(message)
        self.item = item


def as_row(item: Any, where: str = "item") -> dict[str, Any]:
    """
    An item as a row in the conversational vision format. Images keep whatever form they have.

    Args:
        item:
            A text (`str`, whatever it says), a PIL image, the `Path` of an image or text file, a part
            `{"type": "text", "text": ...}` or `{"type": "image", "image": ...}`, a list of those (interleaved, in this
            order), or a row with `messages` and `images`.
        where (`str`, *optional*, defaults to `"item"`):
            What error messages call the item.

    Returns:
        `dict`: `messages`, `images`, `loss_on` and `id`.

    Raises:
        `TypeError`: if the item is of another type.
        `ValueError`: if there is nothing in it, or a file does not exist.
    """
    if isinstance(item, dict) and "type" not in item:
        return conversation_row(item)
    content, images = [], []
    for part in item if isinstance(item, list | tuple) else [item]:
        if isinstance(part, str) and part.lower().endswith(IMAGE_SUFFIXES) and Path(part).is_file():
            logger.warning(
                "%s: %r is taken as a text; for the image in that file, give `Path(%r)`.", where, part, part
            )
        if isinstance(part, Path) and not part.is_file():
            raise ValueError(f"{where}: the file {str(part)!r} does not exist.")
        if isinstance(part, Path) and part.suffix.lower() in TEXT_SUFFIXES:
            part = part.read_text(encoding="utf-8")
        if isinstance(part, dict) and part.get("type") == "text":
            part = part.get("text") or ""
        if isinstance(part, str):
            if not part.strip():
                raise ValueError(f"{where} is empty or holds an empty text; there is nothing to embed.")
            content.append({"type": "text", "text": part.strip()})
        elif isinstance(part, Path | Image.Image):
            content.append({"type": "image", "text": None})
            images.append(part)
        elif isinstance(part, dict) and part.get("type") == "image" and part.get("image") is not None:
            content.append({"type": "image", "text": None})
            images.append(part["image"])
        else:
            found = (
                f"a part with the keys {', '.join(map(str, part))}" if isinstance(part, dict) else type(part).__name__
            )
            raise TypeError(
                f"{where} is or holds {found}; give a text, a PIL image, the Path of an image or text file, a part "
                '{"type": "image", "image": ...}, a list of those, or a row with `messages` and `images`.'
            )
    if not content:
        raise ValueError(f"{where} is an empty list; there is nothing to embed.")
    return {"messages": [{"role": "user", "content": content}], "images": images, "loss_on": "text", "id": None}


@lru_cache  # once a name
def _warn_of_file(text: str) -> None:
    logger.warning("%r is taken as a text; for the image in that file, give `Path(%r)`.", text, text)


class SugarEmbedder:
    """
    Embedding function of a model: called with items, it returns their embeddings.

    Items of similar length share a batch, to save padding. Long inputs are taken window by window, so a lazily decoded
    column of a dataset never has all of its images in memory.

    Args:
        model ([`SugarForConditionalGeneration`]):
            Model. It is in evaluation mode while it embeds, and in its former mode afterwards.
        processor ([`SugarProcessor`]):
            Processor of the model.
        batch_size (`int`, *optional*, defaults to `32`):
            Items in one forward pass.
        project (`bool`, *optional*, defaults to `True`):
            Whether to use the retrieval projector. Without it the embedding is the pooled hidden state itself: the
            baseline for a checkpoint whose projector is not trained.
        pooling (`str`, *optional*, defaults to `"slice"`):
            `"slice"` for the embedding of the last slice, as trained. `"mean"` for the mean over all tokens of the
            item, another baseline for checkpoints without structure training.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Attributes:
        dim (`int`): dimension of the embeddings.
        fingerprint (`str`): samples of the weights, see [`~models.fingerprint_sugar.fingerprint`].

    Raises:
        `ValueError`: for an unknown `pooling`, and for `"mean"` with a model that pools the last token of a slice.

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
    ):
        if pooling not in ("slice", "mean"):
            raise ValueError(f"`pooling` is {pooling!r}; use 'slice' or 'mean'.")
        if pooling == "mean" and model.config.image_pooling != "mean":
            raise ValueError("`pooling='mean'` needs a model with `image_pooling='mean'`.")
        self.model, self.processor, self.batch_size = model, processor, batch_size
        self.project, self.pooling, self.progress = project, pooling, progress

    @property
    def dim(self) -> int:
        config = self.model.config
        return config.retrieval_dim if self.project else config.get_text_config().hidden_size

    @cached_property
    def fingerprint(self) -> str:
        trained = self.project and self.pooling == "slice"
        return fingerprint(self.model, adapters=True) + ("" if trained else f"#{self.pooling}, project={self.project}")

    def __call__(self, items: Sequence[Any]) -> np.ndarray:
        """
        Embeddings of whole items.

        Args:
            items (`Sequence`):
                Each as [`~inference.as_row`] takes it.

        Returns:
            `np.ndarray` of shape `(items, dim)`: float32, L2-normalised.

        Raises:
            `TypeError`: if an item is of another type, or `items` is a single one.
            `ValueError`: if there are no items, one is empty, damaged or too long for the model, or its embedding is not
                finite; names the item.
        """
        return np.stack([embeddings[-1] for embeddings in self.every_slice(items)])

    @torch.no_grad()
    def every_slice(self, items: Sequence[Any], errors: dict[int, ItemError] | None = None) -> list[np.ndarray]:
        """
        Embeddings of all prefixes of items that end with a slice, from one forward pass.

        Args:
            items (`Sequence`):
                As for whole items.
            errors (`dict[int, ItemError]`, *optional*):
                Where to put what is wrong with which item. Without it the first bad item is an error.

        Returns:
            `list[np.ndarray]`: of shape `(slices, dim)` for each item; the last one is that of the whole item. `None`
            for the items in `errors`.

        Raises:
            `TypeError`, `ValueError`: as for whole items.
        """
        if isinstance(items, str | dict | Path | Image.Image):
            raise TypeError(f"`items` is a single {type(items).__name__}. Put it in a list.")
        if len(items) == 0:
            raise ValueError("There are no items to embed.")
        result: list[Any] = [None] * len(items)
        with _evaluating(self.model), tqdm(total=len(items), desc="Embedding", disable=not self.progress) as bar:
            for window in _windows(len(items), self.batch_size):
                rows = {}
                for n in window:
                    try:
                        rows[n] = as_row(items[n], f"item {n}")
                    except ValueError as error:
                        refuse(ItemError(str(error), n), errors)
                for numbers in _batches(rows, self.batch_size):
                    good, inputs = self._inputs(rows, numbers, errors)
                    if good:
                        for n, embeddings in zip(good, self._forward(inputs, good), strict=True):
                            result[n] = embeddings
                    bar.update(len(numbers))
        return result

    def _inputs(
        self, rows: dict[int, dict[str, Any]], numbers: list[int], errors: dict[int, ItemError] | None
    ) -> tuple[list[int], BatchFeature | None]:
        """Inputs of the model, and the items that are in them. In a batch that cannot be encoded, each is tried."""
        names = [f"item {n}" for n in numbers]
        limit = self.model.config.get_text_config().max_position_embeddings
        try:
            conversations = [_filled(rows[n], name) for n, name in zip(numbers, names, strict=True)]
            return numbers, self.processor.encode_conversations(conversations, names=names, max_length=limit)
        except ValueError as error:
            if len(numbers) == 1:
                refuse(ItemError(str(error), numbers[0]), errors)
                return [], None
            good = [n for n in numbers if self._inputs(rows, [n], errors)[0]]
            if len(good) == len(numbers):
                raise
            return self._inputs(rows, good, errors) if good else ([], None)

    def _forward(self, inputs: BatchFeature, numbers: list[int]) -> list[np.ndarray]:
        inputs = inputs.to(self.model.device, dtype=self.model.dtype)
        if self.pooling == "mean":
            inputs["slice_ids"] = inputs["attention_mask"].long() - 1
        embeddings, mask = self.model.embed_slices(**inputs, project=self.project)
        embeddings = embeddings.float().cpu().numpy()
        for n, row in zip(numbers, embeddings, strict=True):
            if not np.isfinite(row).all():
                raise ValueError(
                    f"The embedding of item {n} is not finite in {self.model.dtype}. Load the model in bfloat16 or "
                    "float32."
                )
        counts = mask.sum(dim=1).tolist()
        return [row[:count] for row, count in zip(embeddings, counts, strict=True)]


class SugarGenerator:
    """
    Generating function of a model: called with conversations, it returns the answers.

    Args:
        model ([`SugarForConditionalGeneration`]):
            Model. It is in evaluation mode while it generates, and in its former mode afterwards.
        processor ([`SugarProcessor`]):
            Processor of the model, with a chat template.
        batch_size (`int`, *optional*, defaults to `32`):
            Conversations generated together, padded on the left. Those of similar length share a batch.
        max_new_tokens (`int`, *optional*, defaults to `128`):
            Longest answer.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.
        generation_kwargs:
            Passed on to `model.generate`. Decoding is greedy unless `do_sample` says otherwise.

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
        self.model, self.processor, self.batch_size, self.progress = model, processor, batch_size, progress
        self.generation_kwargs = {"do_sample": False, "max_new_tokens": max_new_tokens, **generation_kwargs}
        self.max_length = model.config.get_text_config().max_position_embeddings

    def __call__(self, conversations: Sequence[dict[str, Any]]) -> list[str]:
        """
        Answers to conversations.

        Args:
            conversations (`Sequence[dict]`):
                Rows in the conversational vision format whose last turn is the user's.

        Returns:
            `list[str]`: only new tokens, without special tokens or white space at the ends.

        Raises:
            `ValueError`: if a row is malformed, too long for the model, or refused by the chat template; names the row.
        """
        answers = [""] * len(conversations)
        with (
            torch.no_grad(),
            _evaluating(self.model),
            tqdm(total=len(conversations), desc="Generating", disable=not self.progress) as bar,
        ):
            for window in _windows(len(conversations), self.batch_size):
                rows = {n: conversations[n] for n in window}
                for numbers in _batches(rows, self.batch_size):
                    names = [row_name(rows[n], n) for n in numbers]
                    inputs = self.inputs([rows[n] for n in numbers], names, self.max_length)
                    sequences = self.model.generate(**inputs, **self.generation_kwargs)
                    new_tokens = sequences[:, inputs["input_ids"].shape[1] :]
                    decoded = self.processor.batch_decode(new_tokens, skip_special_tokens=True)
                    for n, answer in zip(numbers, decoded, strict=True):
                        answers[n] = answer.strip()
                    bar.update(len(numbers))
        return answers

    def inputs(
        self,
        conversations: Sequence[dict[str, Any]],
        names: Sequence[str] | None = None,
        max_length: int | None = None,
    ) -> BatchFeature:
        """
        Inputs of the model, on its device, padded on the left.

        Args:
            conversations (`Sequence[dict]`):
                As in a call.
            names (`Sequence[str]`, *optional*):
                What error messages call them.
            max_length (`int`, *optional*):
                Tokens above which a conversation is an error.
        """
        names = names or [row_name(row, n) for n, row in enumerate(conversations)]
        filled = [_filled(row, name) for row, name in zip(conversations, names, strict=True)]
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

    def stream(self, conversation: dict[str, Any], **generation_kwargs: Any) -> Iterator[str]:
        """
        Answer one conversation piece by piece.

        Args:
            conversation (`dict`):
                As in a call.
            generation_kwargs:
                In place of those of the constructor.

        Returns:
            `Iterator[str]`: pieces of the answer. Generation ends when the iterator is closed.
        """
        inputs = self.inputs([conversation], max_length=self.max_length)
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        closed, errors = Event(), []

        def stop(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), closed.is_set(), device=input_ids.device)

        settings = {**self.generation_kwargs, **generation_kwargs, "stopping_criteria": StoppingCriteriaList([stop])}

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


def refuse(error: ItemError, errors: dict[int, ItemError] | None) -> None:
    """Note what is wrong with an item, or raise it where nothing is noted."""
    if errors is None:
        raise error
    errors[error.item] = error


def _filled(row: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The messages of a row with its images, decoded, in their parts."""
    images = row.get("images") or []
    check_row(row, len(images), name, loss=False)
    return fill_images(row["messages"], [load_image(image, f"{name}, images[{n}]") for n, image in enumerate(images)])


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    was_training = model.training
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()


def _windows(total: int, batch_size: int) -> Iterator[range]:
    return (range(start, min(start + 16 * batch_size, total)) for start in range(0, total, 16 * batch_size))


def _batches(rows: dict[int, dict[str, Any]], batch_size: int) -> Iterator[list[int]]:
    order = sorted(rows, key=lambda n: _length(rows[n]), reverse=True)  # running out of memory shows early
    return (order[start : start + batch_size] for start in range(0, len(order), batch_size))


def _length(row: dict[str, Any]) -> tuple[int, int]:
    """Images, then characters: an image is many tokens."""
    contents = [message["content"] for message in row["messages"]]
    texts = [c if isinstance(c, str) else "".join(part.get("text") or "" for part in c) for c in contents]
    return len(row.get("images") or []), sum(map(len, texts))
