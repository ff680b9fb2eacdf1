"""The first module of a sentence-transformers export where stock modules cannot find the slice. It is copied into the
exported directory, with the processor's file, and needs nothing else of this library."""

import copy
from collections.abc import Iterator
from typing import Any

from PIL import Image
from sentence_transformers.sentence_transformer.modules import Transformer

from .processing_sugar import SugarProcessor


class SugarTransformer(Transformer):
    """
    The stock module, with inputs made by [`SugarProcessor`], and an attention mask that leaves only the last slice to
    the pooling after it: a mean over it is then the embedding that [`SugarForConditionalGeneration.embed`] projects.

    Args:
        image_pooling (`"mean"` or `"last"`, *optional*, defaults to `"mean"`):
            What represents an image: all its tokens or the last one.
        model_name_or_path, kwargs: as of the stock module.
    """

    config_keys = [*Transformer.config_keys, "image_pooling"]

    def __init__(self, model_name_or_path: str, *, image_pooling: str = "mean", **kwargs):
        super().__init__(model_name_or_path, **kwargs)
        self.image_pooling = image_pooling
        # a copy, so that the stock processor is what is saved, with the whole template that the model was trained with
        processor = copy.copy(self.processor)
        processor.chat_template = self.processing_kwargs["chat_template"]["chat_template"]
        self.slice_processor = SugarProcessor.from_processor(processor)

    def preprocess(self, inputs: list[Any], prompt: str | None = None, **kwargs) -> dict[str, Any]:
        """
        Args:
            inputs (`list`): texts, images, mappings of them, and messages, as the stock module takes them.
            prompt (`str`, *optional*): put before each input as a system message.

        Returns:
            `dict`: model inputs, and `last_slice` of shape `(batch, length)`, 1 on the tokens to pool.

        Raises:
            `ValueError`: as [`SugarProcessor.embed_inputs`] does, and for an input longer than `max_seq_length`.
        """
        modality, values, _ = self.input_formatter.parse_inputs(inputs)
        if modality != "message":
            _, values = self.input_formatter.batch_to_message(modality, values)
        conversations = values["message"]
        if prompt:
            conversations = self.input_formatter.prepend_prompt_to_messages(conversations, prompt)
        items = [{"messages": messages, "images": list(_images(messages))} for messages in conversations]
        features = self.slice_processor.embed_inputs(items, max_length=self.max_seq_length)

        slice_ids = features.pop("slice_ids")
        last_slice = slice_ids == slice_ids.amax(dim=1, keepdim=True)
        if self.image_pooling == "last":
            last_slice &= last_slice.flip(1).cumsum(1).flip(1) == 1
        return {**features, "last_slice": last_slice.long(), "modality": "message"}

    def forward(self, features: dict[str, Any], **kwargs) -> dict[str, Any]:
        # the mapping of the caller stays as it is: some losses pass it a second time
        inputs = {name: value for name, value in features.items() if name != "last_slice"}
        return {**super().forward(inputs, **kwargs), "attention_mask": features["last_slice"]}


def _images(messages: list[dict[str, Any]]) -> Iterator[Image.Image | str]:
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else []:
            if part["type"] == "image" and "base64" in part:
                yield f"data:image/png;base64,{part['base64']}"
            elif part["type"] == "image":
                yield next((part[name] for name in ("image", "url", "path") if name in part), None)
