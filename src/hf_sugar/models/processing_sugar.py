import copy
import io
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import torch
from huggingface_hub import get_session
from jinja2 import TemplateError
from PIL import Image
from transformers import AutoProcessor, BatchFeature, PreTrainedConfig, ProcessorMixin
from transformers.dynamic_module_utils import custom_object_save
from transformers.models.auto.processing_auto import processor_class_from_name
from transformers.utils import is_torchvision_available, logging

from .rows_sugar import as_row, fill_images, instructed, to_rgb


logger = logging.get_logger(__name__)

AUTO_MAP = {"AutoProcessor": "processing_sugar.SugarProcessor"}

# LLaVA-1.5's own template puts every image of a message before every text, which takes interleaved documents apart,
# and does not end an answer. This one keeps the order, marks what the assistant says, and is the same otherwise.
SLICE_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% if message['content'] is string %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + ' ' }}{% endif %}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{% generation %}{{ part['text'] + (eos_token if loop.last else ' ') }}{% endgeneration %}"
    "{% else %}{{ part['text'] + ' ' }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

# Stands for the n-th text while the template is rendered, so that its place is known whatever the text says.
_MARK = "\ue000{}\ue001"
_MARK_RE = "\ue000(?P<text>[0-9]+)\ue001"


def image_of(value: Any, where: str) -> Image.Image:
    """The image that a row or content part holds, as [`to_rgb`] gives it: itself, its file, web address (downloaded unless
    `HF_HUB_OFFLINE` is set) or `data:` address. A `ValueError`, which calls it `where`, if there is none that can be read."""
    if not isinstance(value, Image.Image | str | Path):
        raise ValueError(f"{where}: an image is of type {type(value).__name__}. Give a PIL image, a path or a URL.")
    image = value
    try:
        if str(value).startswith("data:"):
            image = io.BytesIO(urlopen(value).read())
        elif str(value).startswith(("http://", "https://")):
            response = get_session().get(value, timeout=60)
            response.raise_for_status()
            image = io.BytesIO(response.content)
        return to_rgb(image if isinstance(image, Image.Image) else Image.open(image))
    except Exception as error:  # Pillow and the network have many
        source = "" if isinstance(value, Image.Image) else f"{str(value)[:200]!r} "
        raise ValueError(f"{where}: the image {source}cannot be read: {error}") from error


@lru_cache(maxsize=4)
def _special_tokens(tokenizer: Any, size: int, *others: str) -> re.Pattern:
    """Finds every special token, and the others. `size` is the tokenizer's, which may grow."""
    # not every token that ends a turn has a name of its own in the tokenizer (Gemma 3's has none)
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    tokens = {*tokenizer.all_special_tokens, *added, *others}
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))


class SugarProcessor(ProcessorMixin):
    """
    The backbone's own processor, and the slices: which token of the model's input represents which image or text. An
    instance is of two classes, this one and the backbone's (`LlavaProcessor` for LLaVA).

    A chat template that does not keep the order of images and texts is replaced by one that does, and that equals
    LLaVA-1.5's in every other respect except that answers end with the end-of-sequence token.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "SugarProcessor":
        """
        Load the processor of a Sugar checkpoint or of a plain backbone.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): Hub id or directory.
            kwargs: arguments of `AutoProcessor.from_pretrained`.

        Raises:
            `ImportError`: if it needs torchvision, which is not installed.
            `OSError`: if a file is missing or damaged.
        """
        stored, _ = cls.get_processor_dict(pretrained_model_name_or_path, **kwargs)
        backbone_class = AutoProcessor
        if "backbone_processor_class" in stored:
            backbone_class = processor_class_from_name(stored["backbone_processor_class"])
        elif "processor_class" not in stored:
            config, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **kwargs)
            if config.get("model_type") == "sugar":
                raise OSError(
                    f"{pretrained_model_name_or_path} lacks processor_config.json. Save the processor there."
                )
        try:
            processor = backbone_class.from_pretrained(pretrained_model_name_or_path, **kwargs)
        except (AttributeError, ImportError, KeyError, RecursionError, ValueError) as error:
            # transformers 5.20 to 5.24 raise all of these for a missing torchvision, and do not always name it
            signs = re.search("torchvision|VIDEO_PROCESSOR_MAPPING|recursion", str(error), re.IGNORECASE)
            if signs and not is_torchvision_available():
                raise ImportError(
                    f"The processor of {pretrained_model_name_or_path} needs torchvision. Run `pip install torchvision`."
                ) from error
            raise OSError(
                f"{pretrained_model_name_or_path}: processor_config.json, tokenizer.json or the like is missing or damaged: {error}"
            ) from error
        if "backbone_processor_class" in stored:  # its template is the one that it was trained with
            return _with_slices(processor)
        return cls.from_processor(processor)

    @classmethod
    def from_processor(cls, processor: ProcessorMixin) -> "SugarProcessor":
        """Give a backbone's processor that is already loaded the methods of this class; it is changed in place."""
        if isinstance(processor, SugarProcessor):
            return processor
        processor = _with_slices(processor)
        if not processor._keeps_order():
            logger.info("The chat template does not keep the order of images and texts; it is replaced.")
            processor.chat_template = SLICE_TEMPLATE.replace("<image>", processor.image_token)
        return processor

    def to_backbone(self) -> ProcessorMixin:
        """A copy that is of the backbone's own class again."""
        processor = copy.deepcopy(self)
        processor.__class__ = type(self).__mro__[2]
        return processor

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """As [`~transformers.ProcessorMixin.save_pretrained`], with the code."""
        # not by `_auto_class`, with which transformers names the code in every part too, and leaves it there
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        custom_object_save(self, save_directory)
        return super().save_pretrained(save_directory, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        backbone_class = type(self).__mro__[2].__name__
        return {**super().to_dict(), "auto_map": AUTO_MAP, "backbone_processor_class": backbone_class}

    def __reduce__(self):
        return _new, (type(self).__mro__[2],), self.__dict__.copy()

    def _keeps_order(self) -> bool:
        if self.chat_template is None:
            return False
        content = [{"type": "text", "text": "\ue000"}, {"type": "image"}, {"type": "text", "text": "\ue001"}]
        rendered = self.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        return bool(re.search(f"\ue000.*{re.escape(self.image_token)}.*\ue001", rendered, re.DOTALL))

    @property
    def _feature_token_ids(self) -> list[int]:
        """Ids of the tokens that image features take the place of. Row breaks and brackets, which some processors
        count among `image_token_ids`, are not; in others (Gemma 3) `image_token_id` is a bracket."""
        return [self.image_token_id] if self.image_token_id in self.image_token_ids else self.image_token_ids

    def count_tokens(self, texts: Sequence[str], image_sizes: Sequence[Sequence[tuple[int, int]]]) -> list[int]:
        """
        Tokens of rows with their images expanded, for putting rows of like length together: no image is processed, and the
        tokens of the chat template are not counted.

        Args:
            texts (`list[str]`): all that each row says.
            image_sizes (`list[list[tuple[int, int]]]`): height and width of each image of each row.
        """
        sizes = [tuple(size) for row in image_sizes for size in row]
        try:
            counts = self._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens if sizes else []
        except AttributeError:  # transformers 5.24 has it in most families
            blank = {size: self.embed_inputs([Image.new("RGB", size[::-1])]) for size in set(sizes)}
            counts = [blank[size]["input_ids"].shape[1] for size in sizes]
        counts = iter(counts)
        of_texts = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return [len(ids) + sum(next(counts) for _ in row) for ids, row in zip(of_texts, image_sizes)]

    def embed_inputs(
        self, items: Sequence[Any], max_length: int | None = None, instruction: str | None = None
    ) -> BatchFeature:
        """
        Model inputs for [`SugarForConditionalGeneration.embed`].

        Args:
            items (`list`):
                What to embed, each as [`~models.rows_sugar.as_row`] takes it; images may be web addresses too. One item that
                is no list may be given as it is.
            max_length (`int`, *optional*): longest sequence that the model takes.
            instruction (`str`, *optional*):
                What is said before them: `query_instruction` or `document_instruction` of the model's configuration.

        Returns:
            `BatchFeature`: as of [`~SugarProcessor.encode_conversations`].

        Raises:
            `TypeError`, `ValueError`: for an item of another type, or one that is empty, cannot be read or is too long.
        """
        if isinstance(items, str | Path | Image.Image | dict):
            items = [items]
        if len(items) == 0:
            raise ValueError("There are no items to embed.")
        names = [f"items[{index}]" for index in range(len(items))]
        conversations = []
        for name, item in zip(names, items):
            row = as_row(item, name, strip=False)
            images = [image_of(image, f"{name}, images[{n}]") for n, image in enumerate(row["images"])]
            conversations.append(instructed(fill_images(row["messages"], images, name), instruction))
        return self.encode_conversations(conversations, names=names, max_length=max_length)

    def encode_conversations(
        self,
        conversations: list[list[dict[str, Any]]],
        loss_on: list[str | None] | None = None,
        names: list[str] | None = None,
        max_length: int | None = None,
        padding_side: str = "right",
    ) -> BatchFeature:
        """
        Render, tokenise and pad conversations, and mark their slices.

        Every content part outside of system messages is one slice, numbered in reading order. A text slice marks its last
        token, an image slice every token that a feature of the image takes the place of. The tokens are those of
        `apply_chat_template(..., tokenize=True)`.

        Args:
            conversations (`list[list[dict]]`):
                Messages whose content is a list of parts `{"type": "text", "text": ...}` or
                `{"type": "image", "image": PIL.Image}`.
            loss_on (`list[str | None]`, *optional*):
                For each conversation which text carries the next-token loss: `"answers"` (what the assistant says and
                the end-of-turn token after it), `"captions"` (texts that follow an image in their message), `"text"`
                (all text), or `None` for no loss. When given, `labels` are returned.
            names (`list[str]`, *optional*): what error messages call the conversations.
            max_length (`int`, *optional*): longest sequence that the model takes, image tokens included.
            padding_side (`str`, *optional*, defaults to `"right"`): side of the padding.

        Returns:
            `BatchFeature`: the tensors of the backbone's processor (`input_ids`, `attention_mask`, `pixel_values` and
            others), `slice_ids` and, with `loss_on`, `labels`, both of shape `(batch, length)`.

        Raises:
            `ValueError`: if the chat template drops, changes or reorders parts, if the processor adds to the text, if a
                text contains a special token, if a sequence is too long, or if no text carries the loss.
        """
        names = names or [f"conversation {index}" for index in range(len(conversations))]
        rendered = [self._render(messages, name) for messages, name in zip(conversations, names)]
        texts = [text for text, _ in rendered]
        contents = [[part for message in messages for part in message["content"]] for messages in conversations]
        images = [[part["image"] for part in parts if part["type"] == "image"] for parts in contents]
        bos = self.tokenizer.bos_token
        batch = self(
            text=list(texts),  # expanded in place by the processor
            images=images if any(images) else None,
            padding=True,
            padding_side=padding_side,
            # as `apply_chat_template` decides it
            add_special_tokens=not (bos is not None and texts[0].startswith(bos)),
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
            # of the images alone: some processors would make tensors of the places of the placeholders too
            images_kwargs={"return_tensors": "pt"},
        )
        # some processors leave the places out of a batch without images
        placeholders = batch.pop("text_replacement_offsets", None) or [[] for _ in conversations]
        batch = batch.convert_to_tensors("pt")
        offsets = batch.pop("offset_mapping").numpy()
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        slice_ids = torch.full_like(batch["input_ids"], -1)
        labels = torch.full_like(batch["input_ids"], -100)
        for row, (name, (_, spans)) in enumerate(zip(names, rendered)):
            if max_length is not None and lengths[row] > max_length:
                raise ValueError(
                    f"{name} has {lengths[row]} tokens after its {len(images[row])} image(s) are expanded; the limit is "
                    f"{max_length}. Shorten or split it, or drop it: cutting could go through an image."
                )
            input_ids = batch["input_ids"][row]
            starts, ends = offsets[row, :, 0], offsets[row, :, 1]
            is_image_token = np.isin(input_ids.numpy(), self._feature_token_ids)
            of_images, grown = iter(placeholders[row]), 0  # characters that the placeholders so far have gained
            for number, (is_image, start, end, loss_end, loss_kinds) in enumerate(spans):
                if is_image:
                    placeholder = next(of_images)
                    start, end = placeholder["new_span"]
                    grown = end - placeholder["span"][1]
                    tokens = np.flatnonzero((starts < end) & (ends > start) & is_image_token)
                else:
                    start, end, loss_end = start + grown, end + grown, loss_end + grown
                    tokens = np.flatnonzero((starts < end) & (ends > start))[-1:]
                    if loss_on is not None and loss_on[row] in loss_kinds:
                        target = torch.from_numpy((starts < loss_end) & (ends > start))
                        labels[row, target] = input_ids[target]
                slice_ids[row, tokens] = number
            if ends.max() > len(texts[row]) + grown:
                raise ValueError(
                    f"{name}: {type(self).__mro__[2].__name__} adds to the text, so the slices are not found. Use another backbone."
                )
            if loss_on is not None and loss_on[row] is not None and (labels[row] == -100).all():
                raise ValueError(
                    f"{name} has no {loss_on[row].removesuffix('s')}, so nothing carries the loss. Add one, or set loss_on='text'."
                )
        batch["slice_ids"] = slice_ids
        if loss_on is not None:
            batch["labels"] = labels
        return batch

    @property
    def _special_tokens(self) -> re.Pattern:
        image_tokens = self.tokenizer.convert_ids_to_tokens(self._feature_token_ids)
        return _special_tokens(self.tokenizer, len(self.tokenizer), self.image_token, *image_tokens)

    def refuse_special_tokens(self, messages: list[dict[str, Any]], name: str) -> None:
        """`ValueError` for a text in which a special token is typed: it would end a turn, or stand for an image."""
        special = self._special_tokens
        for text in [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]:
            if typed := special.search(text):
                problem = f"the text {text[:60]!r} contains {typed.group()!r}, a special token"
                raise ValueError(f"{name}: {problem}. Take it out; an image is a part of its own.")

    def _render(self, messages: list[dict[str, Any]], name: str) -> tuple[str, list[tuple]]:
        """The text of a conversation and, for each slice in order: is it an image, where its text starts and ends,
        where its loss ends, and the kinds of loss that cover it."""
        texts, slices, marked, ends_turn = [], [], [], set()
        self.refuse_special_tokens(messages, name)
        for message in messages:
            role, parts = message["role"], []
            kinds = {"text", "answers"} if role == "assistant" and message.get("learn", True) else {"text"}
            for part in message["content"]:
                if part["type"] == "image":
                    kinds = kinds | {"captions"}
                    slices.append((None, kinds))
                    parts.append({"type": "image"})
                    continue
                if role != "system":
                    slices.append((len(texts), kinds))
                parts.append({"type": "text", "text": _MARK.format(len(texts))})
                texts.append(part["text"])
            if role == "assistant" and parts and parts[-1]["type"] == "text":
                ends_turn.add(len(texts) - 1)
            marked.append({"role": role, "content": parts})
        try:
            rendered = self.apply_chat_template(marked, tokenize=False)
        except TemplateError as error:
            raise ValueError(
                f"{name}: the chat template refuses the conversation ({error}). Change it, or set `processor.chat_template`."
            ) from error

        # The template has put marks and image tokens somewhere; put the texts in and note where each slice is.
        text, spans, cursor, found = "", {}, 0, []
        for match in re.finditer(f"{_MARK_RE}|{re.escape(self.image_token)}", rendered):
            text += rendered[cursor : match.start()]
            cursor = match.end()
            if match["text"] is None:
                found.append(None)
                text += match.group()
                continue
            number, start = int(match["text"]), len(text)
            found.append(number)
            text += texts[number]
            loss_end = len(text)
            if number in ends_turn:
                # what ends the turn belongs to the answer: the model has to learn to stop
                rest = rendered[cursor:].lstrip()
                if stop := self._special_tokens.match(rest):
                    loss_end += len(rendered) - cursor - len(rest) + stop.end()
            spans[number] = start, len(text), loss_end
        text += rendered[cursor:]

        expected = [number for number, _ in slices]
        system = set(range(len(texts))) - set(expected)
        if [number for number in found if number not in system] != expected:
            raise ValueError(
                f"{name}: the chat template drops or reorders parts of the conversation. Set another `processor.chat_template`."
            )
        if self.apply_chat_template(messages, tokenize=False) != text:
            raise ValueError(
                f"{name}: the chat template changes a text (most trim it). Remove white space at the ends of the texts."
            )
        return text, [(number is None, *spans.get(number, (0, 0, 0)), kinds) for number, kinds in slices]


def _with_slices(processor: ProcessorMixin) -> SugarProcessor:
    processor.__class__ = type("SugarProcessor", (SugarProcessor, type(processor)), {})
    return processor


def _new(backbone_class: type) -> SugarProcessor:
    return _with_slices(backbone_class.__new__(backbone_class))
