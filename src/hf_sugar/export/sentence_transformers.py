"""A directory that sentence-transformers loads."""

import json
import shutil
from pathlib import Path
from typing import Any

from jinja2 import Template
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
SLICE_END_TEMPLATE = Path(__file__).with_name("slice_end.jinja")
MODEL_CARD = Path(__file__).with_name("model_card.md")


def slice_end_template(processor: SugarProcessor) -> str:
    """The chat template that the model was trained with, ending where the last slice ends."""
    tokenizer, first = processor.tokenizer, processor.tokenizer.bos_token or ""
    if tokenizer("a")["input_ids"] != tokenizer(f"{first}a", add_special_tokens=False)["input_ids"]:
        first = ""
    template = SLICE_END_TEMPLATE.read_text(encoding="utf-8").rstrip()
    names = {"IMAGE_TOKEN": processor.image_token, "FIRST_TOKEN": first, "MARK": "\ue000"}
    for name, text in {**names, "CHAT_TEMPLATE": processor.chat_template}.items():
        template = template.replace(name, text)
    return template


def find_inexact_input(processor: SugarProcessor, template: str) -> str | None:
    """What differs for an input that stock modules would embed in another way, if there is one. They take the last token
    of the conversation as `template` (see [`slice_end_template`]) cuts it. That is the last slice's last token if the cut
    conversation has the tokens of the whole one up to there, and no more."""
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
    dense = {
        "2_Dense": (projector.linear_1, projector.act, projector.linear_1.out_features),
        "3_Dense": (projector.linear_2, nn.Identity(), dim),
    }
    for path, (linear, activation, size) in dense.items():
        files[f"{path}/config.json"] = {
            "in_features": linear.in_features,
            "out_features": size,
            "bias": linear.bias is not None,
            "activation_function": f"{type(activation).__module__}.{type(activation).__name__}",
        }
    card = Template(MODEL_CARD.read_text(encoding="utf-8"), trim_blocks=True, keep_trailing_newline=True)
    readme = card.render(stock=stock, trust="" if stock else ", trust_remote_code=True")
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
            "head": list(dense),
            "normalize": True,
            "dimensions": dim,
            **{f"{role}_instruction": text for role, text in said.items()},
        }
        if dims := model.config.matryoshka_dims:  # vLLM cuts to these alone
            config["matryoshka_dimensions"] = [short for short in dims if short <= dim]
        files["config.json"] = config
        for path, content in files.items():
            (directory / path).parent.mkdir(exist_ok=True)
            (directory / path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for path, (linear, _, size) in dense.items():
            weights = {f"linear.{key}": value[:size].contiguous() for key, value in linear.state_dict().items()}
            save_file(weights, directory / path / "model.safetensors", metadata={"format": "pt"})
        if not stock:
            for file in ("sugar_transformer.py", "processing_sugar.py", "rows_sugar.py"):
                shutil.copy(Path(models.__file__).parent / file, directory)
        (directory / "README.md").write_text(readme, encoding="utf-8")
    return stock
