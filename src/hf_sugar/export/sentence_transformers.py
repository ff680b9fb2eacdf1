"""A directory that sentence-transformers loads."""

import json
import shutil
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers.utils import logging

from .. import models
from ..models import SugarForConditionalGeneration, SugarProcessor
from ..models.files_sugar import whole_directory


logger = logging.get_logger(__name__)

# The embedding of a document is a hidden state of its last slice; what a chat template puts after that slice (a space,
# the end of the turn) would be what "last token" pooling takes. So this template renders a conversation with the
# checkpoint's own and cuts it where the last slice ends: after its image token, or before what follows its text. Servers
# (vLLM 0.33) add no special tokens to a conversation, so the token that the tokenizer begins with is part of it.
SLICE_END_TEMPLATE = (
    "{% macro sugar_conversation(messages) %}\nCHAT_TEMPLATE{% endmacro %}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('the role ' + message['role'] + ' is unknown; give images and texts that belong together as one "
    'message: [{"role": "user", "content": [{"type": "text", "text": ...}, {"type": "image", "image": ...}]}]\') }}'
    "{% endif %}"
    "{% for part in message['content'] if message['content'] is not string and part['type'] not in ['text', 'image'] %}"
    "{{ raise_exception('a part has the type ' + part['type'] + '; use text or image, and do not mix messages with other "
    "inputs in one call') }}"
    "{% endfor %}{% endfor %}"
    "{% set sugar_text = sugar_conversation(messages) %}"
    "{% if not sugar_text.startswith('FIRST_TOKEN') %}{% set sugar_text = 'FIRST_TOKEN' + sugar_text %}{% endif %}"
    "{% set sugar_last = messages[-1]['content'] %}"
    "{% if sugar_last is not string and sugar_last[-1]['type'] == 'image' %}"
    "{{ sugar_text.rsplit('IMAGE_TOKEN', 1)[0] + 'IMAGE_TOKEN' }}"
    "{% else %}"
    "{% set sugar_mark = '\ue000' if sugar_last is string else sugar_last[:-1] + [{'type': 'text', 'text': '\ue000'}] %}"
    "{% set sugar_marked = sugar_conversation(messages[:-1] + [dict(messages[-1], content=sugar_mark)]) %}"
    "{% set sugar_tail = sugar_marked.rsplit('\ue000', 1)[1] %}"
    "{{ sugar_text[:sugar_text | length - sugar_tail | length].rstrip() }}"
    "{% endif %}"
)

README = """---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags:
- sentence-transformers
- sugar
- feature-extraction
- multimodal
---

# A Sugar model for sentence-transformers

Embeds texts, images, and messages that interleave them, in one space
([method](https://huggingface.co/papers/2411.00304)).

```python
from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("PATH_OR_ID"TRUST)
image = Image.open("photo.jpg")
message = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, {"type": "image", "image": image}]}]
documents = model.encode(["a red circle", image])
print(model.similarity(model.encode([message]), documents))
```

- Images and texts that belong together are one message, as above. A list or tuple of two would be a pair of a query
  and a document, and is refused.
- A call takes messages, or texts and images, but not both: sentence-transformers cannot batch them together.
- A prompt becomes a system message. Of `{"text": ..., "image": ...}` the order of the keys is the order in the message.
- sentence-transformers (6.2) takes a text for an image where it is the name of an image file that exists, a `data:image/`
  string, or the address of an image (`https://...` with a path that ends in `.jpg`, `.png` and so on), which it **fetches from the
  network**. `hf_sugar` itself takes every `str` for a text and fetches nothing. Texts of unknown origin are safe as
  messages: `[{"role": "user", "content": [{"type": "text", "text": text}]}]` is always a text.
- `SentenceTransformer("PATH_OR_ID"TRUST, truncate_dim=...)` cuts embeddings after they are normalised: give its `encode`
  `normalize_embeddings=True` where inner products are to be cosines.
NOTES"""

VLLM_NOTES = """
`config.json` says under `sugar_embedding` what an embedding is made of. By its source (not run), vLLM 0.33.0 serves this
directory with `vllm serve PATH_OR_ID`PLUGIN. Send every input as `messages`: what `/v1/embeddings` gets as `input` is
embedded without the chat template, which gives another embedding.
"""
VLLM_PLUGIN = ", and the plugin in `examples/vllm` of hf_sugar, without which it refuses the model"

STOCK_NOTES = """- White space at the end of a text is removed: some tokenizers join it with what follows.
- Turn images upright and convert them to 8-bit RGB yourself. The stock processor ignores the EXIF orientation of a PIL
  image, drops the transparency of an image file (Sugar's own lays it over white), and clips 16-bit values.
- A text longer than `model.max_seq_length` is cut at its end.
"""

CUSTOM_NOTES = """- An input longer than `model.max_seq_length` is an error.
- `trust_remote_code=True` is needed for `sugar_transformer.py`, `processing_sugar.py` and `rows_sugar.py` in this directory,
  which find the tokens of the last image or text. Read them, and pin a `revision` when you load from the Hub.
"""


def slice_end_template(processor: SugarProcessor) -> str:
    """The chat template that the model was trained with, ending where the last slice ends."""
    tokenizer, first = processor.tokenizer, processor.tokenizer.bos_token or ""
    if tokenizer("a")["input_ids"] != tokenizer(f"{first}a", add_special_tokens=False)["input_ids"]:
        first = ""
    template = SLICE_END_TEMPLATE.replace("IMAGE_TOKEN", processor.image_token).replace("FIRST_TOKEN", first)
    return template.replace("CHAT_TEMPLATE", processor.chat_template)


def find_inexact_input(processor: SugarProcessor, template: str) -> str | None:
    """
    What differs for an input that stock modules would embed in another way, if there is one. They take the last token of
    the conversation as `template` (see [`slice_end_template`]) cuts it. That is the last slice's last token if the cut
    conversation has the tokens of the whole one up to there, and no more.
    """
    backbone_processor = processor.to_backbone()
    texts = ["circle", "A circle.", "(1)", "end\u2026", "\u5713", "\u2b55"]
    image = {"type": "image", "image": Image.new("RGB", (64, 48), "gray")}
    documents = [[{"type": "text", "text": text}] for text in texts]
    documents += [[image], [*documents[0], image], [image, *documents[1]], [image, image]]
    conversations = [[{"role": "user", "content": content}] for content in documents]
    conversations.append([*conversations[-1], {"role": "assistant", "content": documents[1]}])
    for messages in conversations:
        trained = processor.encode_conversations([messages])
        marked = (trained["slice_ids"][0] == trained["slice_ids"].max()).nonzero()
        expected = trained["input_ids"][0, : marked[-1] + 1].tolist()
        stock = backbone_processor.apply_chat_template(
            [messages], chat_template=template, tokenize=True, return_dict=True, return_tensors="pt"
        )
        if stock["input_ids"][0].tolist() != expected:
            parts = [part.get("text", "(image)") for message in messages for part in message["content"]]
            return f"the tokens of {parts} end with {stock['input_ids'][0, -4:].tolist()}, not with {expected[-4:]}"
        if "token_type_ids" in trained:
            return "its attention looks at later tokens (it takes `token_type_ids`)"
    return None


def export_sentence_transformers(
    model: SugarForConditionalGeneration,
    processor: SugarProcessor,
    save_directory: str | Path,
    truncate_dim: int | None = None,
) -> bool:
    """
    Write a directory whose `SentenceTransformer(directory).encode(...)` equals
    [`SugarForConditionalGeneration.embed`].

    Its modules are stock ones: Transformer, Pooling, two Dense (the retrieval projector), Normalize. The first is
    replaced by [`~models.sugar_transformer.SugarTransformer`] where the mean over an image is wanted, or where stock
    modules would take another token than the last of the slice.

    Args:
        model ([`SugarForConditionalGeneration`]): an adapter is merged, and the model stays merged.
        processor ([`SugarProcessor`]): its processor.
        save_directory (`str` or `Path`):
            Directory to write to. It may hold an earlier export, which is replaced, or stays if this fails.
        truncate_dim (`int`, *optional*):
            Length of the embeddings, of which the second Dense then gives no more. Without, all are there to be cut later:
            `SentenceTransformer(directory, truncate_dim=...)`, and `normalize_embeddings=True` in its `encode`.

    Returns:
        `bool`: whether the modules are all stock ones, so that it loads without `trust_remote_code`.

    Raises:
        `ValueError`: if the directory holds anything else, or `truncate_dim` is longer than the embeddings.
    """
    directory = Path(save_directory)
    if directory.exists() and any(directory.iterdir()) and not (directory / "modules.json").is_file():
        raise ValueError(f"{directory} is not empty and holds no earlier export. Name another directory.")
    projector = model.retrieval_projector
    dim = projector.linear_2.out_features if truncate_dim is None else truncate_dim
    if not 0 < dim <= projector.linear_2.out_features:
        raise ValueError(f"`truncate_dim` is {dim}; it must be from 1 to {projector.linear_2.out_features}.")
    template = slice_end_template(processor)
    stock = model.config.image_pooling == "last"
    if stock and (inexact := find_inexact_input(processor, template)):
        stock = False
        logger.warning(
            f"Stock modules of sentence-transformers would not take the last token of the slice: {inexact}. A module of its "
            "own is written instead, so that loading needs `trust_remote_code=True`."
        )

    # the names that sentence-transformers 6.2 saves: vLLM 0.33 takes no others, and would leave the projector out
    base, pooling = (f"sentence_transformers.{name}" for name in ("base.modules", "sentence_transformer.modules"))
    first = f"{base}.transformer.Transformer" if stock else "sugar_transformer.SugarTransformer"
    modules = [{"idx": 0, "name": "0", "path": "", "type": first}]
    for index, kind in enumerate(("Pooling", "Dense", "Dense", "Normalize"), 1):
        name = f"{pooling if kind == 'Pooling' else base}.{kind.lower()}.{kind}"
        modules.append({"idx": index, "name": str(index), "path": f"{index}_{kind}", "type": name})
    call = {"method": "forward", "method_output_name": "last_hidden_state"}
    transformer: dict[str, Any] = {
        "transformer_task": "feature-extraction",
        "modality_config": {"text": call, "image": call, "message": {**call, "format": "structured"}},
        "module_output_name": "token_embeddings",
        "unpad_inputs": False,
    }
    if stock:
        transformer["processing_kwargs"] = {"text": {"padding_side": "right"}}
    else:
        transformer["image_pooling"] = model.config.image_pooling
        transformer["processing_kwargs"] = {"chat_template": {"chat_template": processor.chat_template}}
    # what is said to the model before a query or a document
    said = {role: getattr(model.config, f"{role}_instruction") for role in ("query", "document")}
    files = {
        "modules.json": modules,
        "config_sentence_transformers.json": {
            "model_type": "SentenceTransformer",
            "requirements": {"sentence-transformers": ">=6.2"},
            "prompts": {role: text for role, text in said.items() if text},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
        "sentence_bert_config.json": transformer,
        "1_Pooling/config.json": {
            "embedding_dimension": projector.linear_1.in_features,
            "pooling_mode": "lasttoken" if stock else "mean",
            "include_prompt": True,
        },
        "4_Normalize/config.json": {"module_input_name": "sentence_embedding"},
    }
    dense = (
        ("2_Dense", projector.linear_1, projector.act, projector.linear_1.out_features),
        ("3_Dense", projector.linear_2, nn.Identity(), dim),
    )
    for path, linear, activation, size in dense:
        files[f"{path}/config.json"] = {
            "in_features": linear.in_features,
            "out_features": size,
            "bias": linear.bias is not None,
            "activation_function": f"{type(activation).__module__}.{type(activation).__name__}",
        }
    readme = README.replace("TRUST", "" if stock else ", trust_remote_code=True")
    readme = readme.replace("NOTES", (STOCK_NOTES if stock else CUSTOM_NOTES) + VLLM_NOTES)
    readme = readme.replace("PLUGIN", "" if stock else VLLM_PLUGIN)
    with whole_directory(directory) as directory:
        model.export_backbone(directory, merge=True)
        stored = processor.to_backbone()
        stored.chat_template = template
        stored.save_pretrained(directory)
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        if not stock:  # vLLM refuses a model that it does not know, where a known one would be pooled in another way
            config["architectures"] = [f"Sugar{name}" for name in config["architectures"]]
        config["sugar_embedding"] = {
            "chat_template": "chat_template.jinja",  # ends where the last slice does
            "text_pooling": "last",
            "image_pooling": model.config.image_pooling,
            "head": [path for path, *_ in dense],
            "normalize": True,
            "dimensions": files["3_Dense/config.json"]["out_features"],
            **{f"{role}_instruction": text for role, text in said.items()},
        }
        if dims := model.config.matryoshka_dims:  # vLLM cuts to these alone
            config["matryoshka_dimensions"] = [dim for dim in dims if dim <= config["sugar_embedding"]["dimensions"]]
        files["config.json"] = config
        for path, content in files.items():
            (directory / path).parent.mkdir(exist_ok=True)
            (directory / path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for path, linear, _, size in dense:
            weights = {f"linear.{key}": value[:size].contiguous() for key, value in linear.state_dict().items()}
            save_file(weights, directory / path / "model.safetensors", metadata={"format": "pt"})
        if not stock:
            for file in ("sugar_transformer.py", "processing_sugar.py", "rows_sugar.py"):
                shutil.copy(Path(models.__file__).parent / file, directory)
        (directory / "README.md").write_text(readme, encoding="utf-8")
    return stock
