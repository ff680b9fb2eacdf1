"""Random models of real architectures, small enough to build in a test."""

import numpy as np
import torch
import transformers as T
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil


SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]

# The chat template of llava-hf/llava-1.5-7b-hf: images first, then texts, in every message.
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def tokenizer(*special: str, **named: str) -> PreTrainedTokenizerFast:
    """With more special tokens, and those that a processor asks for by name: without any, LLaVA's."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=352, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(
        ["USER: what is this? ASSISTANT: a red circle", "a blue square left of a star"] * 4, trainer
    )
    result = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=named or {"image_token": "<image>"},
    )
    result.add_tokens(list(special), special_tokens=True)
    return result


def processor(size: int = 28, chat_template: str | None = LLAVA_TEMPLATE) -> LlavaProcessor:
    images = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return LlavaProcessor(
        images,
        tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )


def llava(
    seed: int = 0,
    hidden_size: int = 32,
    vision_hidden_size: int = 32,
    layers: int = 2,
    size: int = 28,
    max_positions: int = 512,
    tied: bool = False,
) -> LlavaForConditionalGeneration:
    set_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=vision_hidden_size,
        intermediate_size=2 * vision_hidden_size,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=size,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=384,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=max_positions,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=tied,
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=4,
        image_seq_length=(size // 14) ** 2,
        tie_word_embeddings=tied,
    )
    return LlavaForConditionalGeneration(config).eval()


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def image(seed: int = 0, height: int = 30, width: int = 30) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 255, (height, width, 3), dtype=np.uint8))


def teachers(path) -> dict[str, str]:
    """Random CLIP, DINOv2 and BERT in directories, as the `teachers` setting names them."""
    set_seed(0)
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    words = dict(small, vocab_size=384)
    text = dict(words, max_position_embeddings=64, eos_token_id=2, pad_token_id=0, bos_token_id=1)
    vision = dict(small, image_size=28, patch_size=14)
    dinov2 = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2
    )
    for name, model in (
        ("cross", T.CLIPModel(T.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))),
        ("image", T.Dinov2Model(T.Dinov2Config(**dinov2))),
        ("text", T.BertModel(T.BertConfig(**words))),
    ):
        model.save_pretrained(path / name)
        if name != "text":
            images.save_pretrained(path / name)
        if name != "image":
            tokens = tokenizer()
            tokens.model_max_length = 64
            tokens.save_pretrained(path / name)
    return {name: str(path / name) for name in ("image", "text", "cross")}


TEXTS = ["a red circle", "a small blue square left of a star", "star", "a red circle and a small star left of it"]


def word_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """A token for each word of `TEXTS`, between [CLS] and [SEP]."""
    words = ["[PAD]", "[CLS]", "[UNK]", "[SEP]", *sorted({word for text in TEXTS for word in text.split()})]
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", 1), ("[SEP]", 3)]
    tokens.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "unk_token": "[UNK]", "eos_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokens, model_max_length=max_length, **special)


def encoder(kind: str, directory, seed: int = 0, max_length: int | None = None) -> str:
    """A random `clip`, `siglip`, `dinov2` or `bert` that reads words, in a directory."""
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    vision, words = dict(small, image_size=16, patch_size=8), dict(small, vocab_size=32, pad_token_id=0)
    crop = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    set_seed(seed)
    if kind == "clip":
        text = dict(words, max_position_embeddings=12, bos_token_id=1, eos_token_id=3, projection_dim=20)
        vision = dict(vision, projection_dim=20)
        config = T.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
        model, images, length = T.CLIPModel(config), crop, 12
    elif kind == "siglip":
        text = dict(words, max_position_embeddings=16, projection_size=32)
        model, length = T.SiglipModel(T.SiglipConfig(text_config=text, vision_config=vision)), 10**30
        images = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    elif kind == "dinov2":
        model, images, length = T.Dinov2Model(T.Dinov2Config(**dict(vision, hidden_size=16))), crop, None
    else:
        bert = dict(words, hidden_size=24, max_position_embeddings=32, initializer_range=0.5)
        model, images, length = T.BertModel(T.BertConfig(**bert)), None, 32
    model.save_pretrained(directory)
    if images:
        images.save_pretrained(directory)
    if length:
        word_tokenizer(max_length or length).save_pretrained(directory)
    return str(directory)
