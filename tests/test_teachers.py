import ast
import gc
import json
import logging
import os
import shutil
import subprocess
import sys
import time
import weakref
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetModel,
    SegformerConfig,
    SegformerModel,
    SiglipConfig,
    SiglipModel,
    SiglipTextModel,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
    T5Config,
    T5Model,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
    set_seed,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from hf_sugar.alignment import IMAGE, TEXT
from hf_sugar.data import load_image, row_slices
from hf_sugar.models.rows_sugar import row_name
from hf_sugar.teachers import TeacherCache, TripleEncoder, slice_key
from hf_sugar.world import checkpoint


TEXTS = ["a red circle", "a small blue square left of a star", "star", "a red circle and a small star left of it"]


def picture(seed: int, width: int = 20, height: int = 24) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8))


def save_tokenizer(directory: Path, max_length: int) -> None:
    words = ["[PAD]", "[CLS]", "[UNK]", "[SEP]", *sorted({word for text in TEXTS for word in text.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        unk_token="[UNK]",
        eos_token="[SEP]",
        model_max_length=max_length,
    ).save_pretrained(directory)


def build_clip(directory: Path, seed: int = 0) -> str:
    set_seed(seed)
    small = dict(projection_dim=20, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    text = dict(small, vocab_size=32, max_position_embeddings=12, bos_token_id=1, eos_token_id=3, pad_token_id=0)
    vision = dict(small, image_size=16, patch_size=8)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)).save_pretrained(directory)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(directory)
    save_tokenizer(directory, 12)
    return str(directory)


def build_siglip(directory: Path) -> str:
    set_seed(0)
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    text = dict(small, vocab_size=32, max_position_embeddings=16, projection_size=32, pad_token_id=0)
    SiglipModel(
        SiglipConfig(text_config=text, vision_config=dict(small, image_size=16, patch_size=8))
    ).save_pretrained(directory)
    SiglipImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(directory)
    save_tokenizer(directory, 10**30)
    return str(directory)


def build_dinov2(directory: Path) -> str:
    set_seed(1)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8)
    Dinov2Model(config).save_pretrained(directory)
    BitImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(directory)
    return str(directory)


def build_bert(directory: Path, seed: int = 2, max_length: int = 32) -> str:
    set_seed(seed)
    config = BertConfig(
        vocab_size=32,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(directory)
    save_tokenizer(directory, max_length)
    return str(directory)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("teachers")
    return {
        "clip": build_clip(root / "clip"),
        "siglip": build_siglip(root / "siglip"),
        "dinov2": build_dinov2(root / "dinov2"),
        "bert": build_bert(root / "bert"),
    }


@pytest.fixture(scope="module")
def encoder(checkpoints):
    return TripleEncoder(checkpoints["dinov2"], checkpoints["bert"], checkpoints["clip"], device="cpu", batch_size=3)


@pytest.fixture(scope="module")
def clip_only(checkpoints):
    return TripleEncoder(None, None, checkpoints["clip"], device="cpu")


def tokens(directory: str, text: str, **kwargs) -> dict[str, torch.Tensor]:
    return dict(PreTrainedTokenizerFast.from_pretrained(directory)(text, return_tensors="pt", **kwargs))


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


# --- the encoder against stock classes, one slice at a time and without padding


@torch.no_grad()
def test_embeddings_are_those_of_the_stock_classes(encoder, checkpoints):
    images = [picture(i, width=20 + 3 * i) for i in range(4)]
    slices = [TEXTS[1], images[0], images[1], TEXTS[0], TEXTS[2], images[2], TEXTS[3], images[3]]
    dinov2 = Dinov2Model.from_pretrained(checkpoints["dinov2"]).eval()
    bert = BertModel.from_pretrained(checkpoints["bert"]).eval()
    clip_text = CLIPTextModelWithProjection.from_pretrained(checkpoints["clip"]).eval()
    clip_image = CLIPVisionModelWithProjection.from_pretrained(checkpoints["clip"]).eval()
    for item, found in zip(slices, encoder.encode(slices), strict=True):
        if isinstance(item, str):
            first = bert(**tokens(checkpoints["bert"], item)).last_hidden_state[0, 0]
            second = clip_text(**tokens(checkpoints["clip"], item)).text_embeds[0]
        else:
            pixels = BitImageProcessorPil.from_pretrained(checkpoints["dinov2"])(item, return_tensors="pt")
            first = dinov2(**pixels).last_hidden_state[0, 0]
            first = torch.cat([first, torch.zeros(24 - 16)])  # narrower than the text encoder
            pixels = CLIPImageProcessorPil.from_pretrained(checkpoints["clip"])(item, return_tensors="pt")
            second = clip_image(**pixels).image_embeds[0]
        torch.testing.assert_close(found, torch.cat([unit(first), unit(second)]), atol=1e-5, rtol=0)
    assert (encoder.split, encoder.dim) == (24, 24 + 20)
    assert encoder.modality(slices).tolist() == [TEXT, IMAGE, IMAGE, TEXT, TEXT, IMAGE, TEXT, IMAGE]


@torch.no_grad()
def test_siglip_pads_texts_to_their_full_length_without_a_mask(checkpoints):
    encoder = TripleEncoder(None, None, checkpoints["siglip"], device="cpu", batch_size=2)
    text_model = SiglipTextModel.from_pretrained(checkpoints["siglip"]).eval()
    vision_model = SiglipVisionModel.from_pretrained(checkpoints["siglip"]).eval()
    found = encoder.encode([*TEXTS, picture(0)])
    assert encoder.dim == 32
    for text, embedding in zip(TEXTS, found, strict=False):
        ids = tokens(checkpoints["siglip"], text)["input_ids"]
        ids = F.pad(ids, (0, 16 - ids.shape[1]), value=0)
        torch.testing.assert_close(embedding, unit(text_model(input_ids=ids).pooler_output[0]), atol=1e-5, rtol=0)
    pixels = SiglipImageProcessorPil.from_pretrained(checkpoints["siglip"])(picture(0), return_tensors="pt")
    torch.testing.assert_close(found[-1], unit(vision_model(**pixels).pooler_output[0]), atol=1e-5, rtol=0)


def test_clip_alone_has_no_split(clip_only, encoder):
    slices = [picture(0), *TEXTS, picture(1)]
    assert (clip_only.split, clip_only.dim) == (None, 20)
    torch.testing.assert_close(clip_only.encode(slices), encoder.encode(slices)[:, 24:], atol=1e-6, rtol=0)


def test_unloaded_weights_are_freed_and_come_back(checkpoints):
    encoder = TripleEncoder(checkpoints["dinov2"], checkpoints["bert"], checkpoints["clip"], device="cpu")
    expected = encoder.encode(TEXTS)
    weights = [weakref.ref(teacher.model) for teacher in encoder._teachers]
    encoder.unload()
    gc.collect()
    assert len(weights) == 3 and all(weight() is None for weight in weights)
    assert torch.equal(encoder.encode(TEXTS), expected)


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(8)), batch_size=st.integers(1, 9))
def test_order_and_batch_size_do_not_matter(encoder, order, batch_size):
    slices = [*TEXTS, *(picture(i, width=17 + i) for i in range(4))]
    reference = torch.cat([encoder.encode([item]) for item in slices])
    original, encoder.batch_size = encoder.batch_size, batch_size
    try:
        found = encoder.encode([slices[i] for i in order])
    finally:
        encoder.batch_size = original
    torch.testing.assert_close(found, reference[list(order)], atol=1e-5, rtol=0)


def test_output_form(encoder):
    embeddings = encoder.encode([picture(0), "star"])
    assert embeddings.dtype == torch.float32 and embeddings.device.type == "cpu" and not embeddings.requires_grad
    torch.testing.assert_close(embeddings[:, :24].norm(dim=1), torch.ones(2))
    torch.testing.assert_close(embeddings[:, 24:].norm(dim=1), torch.ones(2))
    assert encoder.encode([]).shape == (0, 44)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(encoder.encode([picture(0), "star"]), embeddings, atol=1e-6, rtol=0)


def test_image_modes_and_odd_shapes(encoder):
    grey = picture(0).convert("L")
    torch.testing.assert_close(encoder.encode([grey]), encoder.encode([grey.convert("RGB")]))
    # three rows of pixels are not three channels
    red = encoder.encode([Image.new("RGB", size, (200, 30, 90)) for size in ((20, 24), (20, 3), (3, 3), (1, 3))])
    torch.testing.assert_close(red, red[:1].expand_as(red), atol=1e-5, rtol=0)


def test_bfloat16_runs_in_bfloat16(checkpoints, encoder):
    half = TripleEncoder(
        checkpoints["dinov2"], checkpoints["bert"], checkpoints["clip"], device="cpu", dtype=torch.bfloat16
    )
    slices = [picture(0), "a red circle"]
    found, reference = half.encode(slices), encoder.encode(slices)
    assert found.dtype == torch.float32
    assert 1e-5 < (found - reference).abs().max() < 0.1
    assert half.fingerprint != encoder.fingerprint


@torch.no_grad()
def test_one_encoder_alone(checkpoints, encoder):
    for role, name, item, other in (
        ("image", "dinov2", picture(0), "star"),
        ("text", "bert", "a red circle", picture(0)),
    ):
        alone = TripleEncoder.from_teachers({role: checkpoints[name]}, device="cpu")
        found = alone.encode([item])
        assert alone.split is None and found.shape == (1, alone.dim)
        torch.testing.assert_close(found[0], encoder.encode([item])[0, : alone.dim], atol=1e-6, rtol=0)
        with pytest.raises(ValueError, match=rf"slices\[1\] is an? (text|image), .* {role}=.*Name all three"):
            alone.encode([item, other])


@torch.no_grad()
def test_a_dual_encoder_in_every_place(checkpoints):
    clip, siglip = checkpoints["clip"], checkpoints["siglip"]
    encoder = TripleEncoder(siglip, clip, clip, device="cpu")
    found = encoder.encode(["a red circle", picture(0)])
    clip_only = TripleEncoder(None, None, clip, device="cpu").encode(["a red circle", picture(0)])
    siglip_only = TripleEncoder(None, None, siglip, device="cpu").encode([picture(0)])
    torch.testing.assert_close(found[0, :20], clip_only[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(found[1, :32], siglip_only[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(found[:, 32:], clip_only, atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_shipped_checkpoints_against_the_stock_classes():
    """Real tokenizers, processors and trained weights, in batches of unequal lengths."""
    paths = [str(checkpoint(name)) for name in ("dinov2", "bert", "clip")]
    texts = ["a red circle", "two blue squares left of a green star", "star"]
    images = [picture(i, width=40 + 9 * i, height=50) for i in range(3)]
    encoder = TripleEncoder(*paths, device="cpu")
    found = encoder.encode([*texts, *images])
    dinov2, bert, clip = (
        model.from_pretrained(path, dtype=torch.float32).eval()
        for model, path in zip((Dinov2Model, BertModel, CLIPModel), paths)
    )
    for text, embedding in zip(texts, found[:3]):
        first = bert(**AutoTokenizer.from_pretrained(paths[1])(text, return_tensors="pt")).last_hidden_state[0, 0]
        second = clip.get_text_features(**AutoTokenizer.from_pretrained(paths[2])(text, return_tensors="pt"))
        second = second.pooler_output[0]
        torch.testing.assert_close(embedding[: len(first)], unit(first), atol=1e-5, rtol=0)
        torch.testing.assert_close(embedding[encoder.split :], unit(second), atol=1e-5, rtol=0)
    for image, embedding in zip(images, found[3:]):
        pixels = [
            AutoImageProcessor.from_pretrained(paths[n], backend="pil")(image, return_tensors="pt") for n in (0, 2)
        ]
        first, second = dinov2(**pixels[0]).pooler_output[0], clip.get_image_features(**pixels[1]).pooler_output[0]
        torch.testing.assert_close(embedding[: len(first)], unit(first), atol=1e-5, rtol=0)
        torch.testing.assert_close(embedding[encoder.split :], unit(second), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["convnext", "resnet", "swin"])
def test_pooled_vision_models(checkpoints, tmp_path, name):
    set_seed(0)
    config, model = {
        "convnext": (ConvNextConfig(depths=[1, 1], hidden_sizes=[8, 16], num_stages=2), ConvNextModel),
        "resnet": (
            ResNetConfig(embedding_size=8, depths=[1, 1], hidden_sizes=[8, 16], layer_type="basic"),
            ResNetModel,
        ),
        "swin": (
            SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4),
            SwinModel,
        ),
    }[name]
    model(config).save_pretrained(tmp_path)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    encoder = TripleEncoder(image=str(tmp_path), text=None, cross=None, device="cpu")
    pixels = CLIPImageProcessorPil.from_pretrained(tmp_path)(picture(0), return_tensors="pt")
    expected = model.from_pretrained(tmp_path).eval()(**pixels).pooler_output.flatten()
    torch.testing.assert_close(encoder.encode([picture(0)])[0], unit(expected), atol=1e-5, rtol=0)


def test_vision_models_without_a_definite_embedding_are_refused(tmp_path):
    set_seed(0)
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    mae = ViTMAEConfig(**small, image_size=16, patch_size=4)
    segformer = SegformerConfig(
        num_encoder_blocks=1,
        depths=[1],
        sr_ratios=[1],
        hidden_sizes=[8],
        patch_sizes=[4],
        strides=[4],
        num_attention_heads=[1],
        mlp_ratios=[2],
    )
    for model, config, message in (
        (ViTMAEModel, mae, "another embedding each time"),
        (SegformerModel, segformer, "neither a pooled output nor a first token"),
    ):
        path = tmp_path / model.__name__
        model(config).save_pretrained(path)
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(path)
        with pytest.raises(ValueError, match=rf"{model.__name__}.*{message}"):
            TripleEncoder(image=str(path), text=None, cross=None, device="cpu").encode([picture(0)])


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "lasttoken", "mean_sqrt_len_tokens"])
def test_texts_are_embedded_as_sentence_transformers_does(tmp_path, pooling):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import modules

    path = build_bert(tmp_path / "bert")
    transformer = modules.Transformer(path, max_seq_length=8)
    parts = [transformer, modules.Pooling(24, pooling), modules.Normalize()]
    sentence_transformers.SentenceTransformer(modules=parts, device="cpu").save(str(tmp_path / "st"))
    texts = [*TEXTS, "  star a "]
    reference = sentence_transformers.SentenceTransformer(str(tmp_path / "st"), device="cpu").encode(texts)
    encoder = TripleEncoder(None, str(tmp_path / "st"), None, device="cpu", long_text="truncate")
    torch.testing.assert_close(encoder.encode(texts), torch.from_numpy(reference), atol=1e-5, rtol=0)


# --- pooling


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}, "lasttoken"),
        ({"pooling_mode": "mean", "embedding_dimension": 24}, "mean"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_sqrt_len_tokens": True}, "cls+mean_sqrt_len"),
    ],
)
@torch.no_grad()
def test_sentence_transformers_pooling(checkpoints, tmp_path, config, pooling):
    path = build_bert(tmp_path / "bert")
    (tmp_path / "bert" / "1_Pooling").mkdir()
    (tmp_path / "bert" / "1_Pooling" / "config.json").write_text(json.dumps(config))
    encoder = TripleEncoder(checkpoints["dinov2"], path, checkpoints["clip"], device="cpu")
    bert = BertModel.from_pretrained(path).eval()
    for text, found in zip(TEXTS, encoder.encode(TEXTS), strict=True):
        hidden = bert(**tokens(path, text)).last_hidden_state[0]
        expected = {
            "cls": hidden[0],
            "mean": hidden.mean(0),
            "max": hidden.amax(0),
            "lasttoken": hidden[-1],
            "cls+mean_sqrt_len": torch.cat([hidden[0], hidden.sum(0) / len(hidden) ** 0.5]),
        }[pooling]
        torch.testing.assert_close(found[: encoder.split], unit(expected), atol=1e-5, rtol=0)


def test_pooling_that_is_not_known_is_refused(checkpoints, tmp_path):
    path = build_bert(tmp_path / "bert")
    (tmp_path / "bert" / "1_Pooling").mkdir()
    pooling = tmp_path / "bert" / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"pooling_mode_weightedmean_tokens": True}))
    with pytest.raises(ValueError, match=r"weightedmean_tokens.*1_Pooling/config.json"):
        TripleEncoder(checkpoints["dinov2"], path, checkpoints["clip"], device="cpu")
    pooling.write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    names = ("Transformer", "Pooling", "Dense")
    modules = [{"type": f"sentence_transformers.models.{name}", "path": f"{i}_{name}"} for i, name in enumerate(names)]
    (tmp_path / "bert" / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match="not applied here: Dense"):
        TripleEncoder(checkpoints["dinov2"], path, checkpoints["clip"], device="cpu")


@torch.no_grad()
def test_first_token_where_the_pooler_was_never_trained(checkpoints, tmp_path):
    set_seed(0)
    config = ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    encoder = TripleEncoder(str(tmp_path), checkpoints["bert"], checkpoints["clip"], device="cpu")
    pixels = CLIPImageProcessorPil.from_pretrained(tmp_path)(picture(0), return_tensors="pt")
    expected = ViTModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()(**pixels).last_hidden_state[0, 0]
    torch.testing.assert_close(encoder.encode([picture(0)])[0, :16], unit(expected), atol=1e-5, rtol=0)


# --- long texts


def test_truncation_is_counted_and_reported_once(checkpoints, tmp_path, caplog):
    bert = build_bert(tmp_path / "bert", max_length=32)
    (tmp_path / "bert" / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 20}))
    encoder = TripleEncoder(
        checkpoints["dinov2"], bert, checkpoints["clip"], device="cpu", batch_size=2, long_text="truncate"
    )
    exact = " ".join(["star"] * 10)  # 12 tokens with [CLS] and [SEP]
    over_clip, over_both = exact + " red", " ".join(["star"] * 19)
    with caplog.at_level(logging.WARNING, logger="hf_sugar"):
        encoder.encode([exact, "star", picture(0)])
    assert not caplog.records
    with caplog.at_level(logging.WARNING, logger="hf_sugar"):
        encoder.encode([over_clip, "star", over_both, over_clip, exact])
    (record,) = caplog.records
    assert "Of 5 texts" in record.getMessage() and "They were cut" in record.getMessage()
    assert "1 than the 20 tokens of the text teacher" in record.getMessage()
    assert "3 than the 12 tokens of the cross teacher" in record.getMessage()
    caplog.clear()
    counts = Counter()
    encoder.encode([over_clip], long_texts=counts)
    encoder.encode([over_both], long_texts=counts)
    assert counts == {"cross": 2, "text": 1} and not caplog.records
    # CLIP's last token survives the cut
    torch.testing.assert_close(encoder.encode([over_clip])[:, 24:], encoder.encode([exact])[:, 24:], atol=1e-6, rtol=0)


@torch.no_grad()
def test_windows_are_averaged(encoder, checkpoints, caplog):
    """Halved at the middle space until each part has at most 12 tokens, two of which are special."""
    words = [*"a red circle and a small star left of a small blue square and a red star".split(), *["star"] * 6]
    clip_text = CLIPTextModelWithProjection.from_pretrained(checkpoints["clip"]).eval()

    def embed(text):
        return unit(clip_text(**tokens(checkpoints["clip"], text)).text_embeds[0])

    two, four = " ".join(words[:13]), " ".join(words[:22])
    expected = unit(embed("a red circle and a small star") + embed("left of a small blue square"))
    with caplog.at_level(logging.WARNING, logger="hf_sugar"):
        found = encoder.encode([two, "star", four])
    torch.testing.assert_close(found[0, 24:], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1, 24:], embed("star"), atol=1e-5, rtol=0)
    windows = encoder._cross._windows(four)
    assert " ".join(windows).split() == words[:22] and all(n <= 12 for n in encoder._cross._lengths(windows))
    torch.testing.assert_close(found[2, 24:], unit(sum(map(embed, windows))), atol=1e-5, rtol=0)
    (record,) = [record for record in caplog.records if record.name.startswith("hf_sugar")]
    assert "2 than the 12 tokens of the cross teacher" in record.getMessage() and "windows" in record.getMessage()
    assert encoder.encode(["x" * 500]).shape == (1, 44)  # one word is one token here, whatever its length


def test_text_without_spaces_is_split_in_the_middle(encoder):
    assert encoder._cross._windows("+" * 30 + "-") == ["+" * 30 + "-"]
    text = "+a" * 20  # 40 tokens
    windows = encoder._cross._windows(text)
    assert "".join(windows) == text and all(n <= 12 for n in encoder._cross._lengths(windows))


# --- fingerprint and construction


def test_fingerprint_follows_what_decides_the_embeddings(checkpoints, tmp_path):
    def fingerprint(directory):
        return TripleEncoder(checkpoints["dinov2"], str(directory), checkpoints["clip"], device="cpu").fingerprint

    first = fingerprint(build_bert(tmp_path / "first"))
    assert len(first) == 64 and int(first, 16) >= 0
    assert fingerprint(build_bert(tmp_path / "copy")) == first  # the same files elsewhere
    (tmp_path / "copy" / "README.md").write_text("a card")
    assert fingerprint(tmp_path / "copy") == first
    (tmp_path / "copy" / "1_Pooling").mkdir()
    (tmp_path / "copy" / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    assert fingerprint(tmp_path / "copy") != first
    assert fingerprint(build_bert(tmp_path / "other_weights", seed=3)) != first
    assert fingerprint(build_bert(tmp_path / "other_tokenizer", max_length=31)) != first
    roles = [TripleEncoder(None, None, checkpoints[name], device="cpu").fingerprint for name in ("clip", "siglip")]
    assert len({first, *roles}) == 3


def test_fingerprint_reads_no_weights(checkpoints, monkeypatch):
    monkeypatch.setattr("hf_sugar.teachers.encoder.AutoModel", None)
    encoder = TripleEncoder(checkpoints["dinov2"], checkpoints["bert"], checkpoints["clip"], device="cpu")
    assert encoder.fingerprint
    assert all(part in encoder.description for part in ("image=", "text=", "cross=", checkpoints["clip"], "float32"))


def test_hub_checkpoints_are_pinned_to_their_commit(checkpoints, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--org--clip"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    os.symlink(checkpoints["clip"], repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    encoder = TripleEncoder(None, None, "org/clip", device="cpu")
    assert "org/clip@0123456789ab" in encoder.description
    local = TripleEncoder(None, None, checkpoints["clip"], device="cpu")
    assert encoder.fingerprint != local.fingerprint
    torch.testing.assert_close(encoder.encode(["star", picture(0)]), local.encode(["star", picture(0)]))


def test_from_teachers(checkpoints, encoder):
    mapping = {"image": checkpoints["dinov2"], "text": checkpoints["bert"], "cross": checkpoints["clip"]}
    assert TripleEncoder.from_teachers(mapping, device="cpu").fingerprint == encoder.fingerprint
    clip = TripleEncoder.from_teachers({"cross": checkpoints["clip"]}, device="cpu")
    nulls = {"image": None, "text": None, "cross": checkpoints["clip"]}
    assert clip.split is None
    assert clip.fingerprint == TripleEncoder.from_teachers(nulls, device="cpu").fingerprint
    settings = {**mapping, "dtype": "bfloat16", "long_text": "truncate"}
    truncating = TripleEncoder.from_teachers(settings, device="cpu")
    assert (truncating.dtype, truncating.long_text) == (torch.bfloat16, "truncate")
    fingerprints = {
        TripleEncoder.from_teachers({**mapping, **change}, device="cpu").fingerprint
        for change in ({}, {"dtype": "bfloat16"}, {"long_text": "truncate"}, {"batch_size": 2}, settings)
    }
    assert len(fingerprints) == 4  # the batch size decides nothing
    for two in ({"image", "text"}, {"image", "cross"}, {"text", "cross"}):
        with pytest.raises(ValueError, match="Give all three"):
            TripleEncoder.from_teachers({role: mapping[role] for role in two})
    with pytest.raises(ValueError, match=r"\['clip'\].*image, text and cross"):
        TripleEncoder.from_teachers({"clip": checkpoints["clip"]})


def test_the_tiny_set_is_the_one_in_the_package():
    tiny = TripleEncoder.from_teachers("tiny", device="cpu")
    mapping = {
        role: str(checkpoint(name)) for role, name in (("image", "dinov2"), ("text", "bert"), ("cross", "clip"))
    }
    assert tiny.checkpoints == mapping and TripleEncoder.from_teachers(mapping).fingerprint == tiny.fingerprint


def test_defaults_are_those_of_the_paper(monkeypatch):
    paths = []
    monkeypatch.setattr("hf_sugar.teachers.encoder._Teacher", lambda role, path, *args: paths.append((role, path)))
    TripleEncoder.from_teachers(None)
    TripleEncoder.from_teachers("default")
    assert paths == 2 * [
        ("image", "facebook/dinov2-base"),
        ("text", "BAAI/bge-base-en-v1.5"),
        ("cross", "openai/clip-vit-large-patch14"),
    ]


def test_construction_errors(checkpoints, tmp_path):
    with pytest.raises(ValueError, match="Give all three"):
        TripleEncoder(None, checkpoints["bert"], checkpoints["clip"])
    with pytest.raises(ValueError, match="Give all three"):
        TripleEncoder(None, None, None)
    for teachers, message in (
        ("openai/clip", r"'openai/clip'. Use one of default, tiny, or .*{'cross': 'openai/clip'}"),
        (["clip"], "mapping of image, text and cross"),
        ({"vision": "x"}, r"Unknown keys in `teachers`: \['vision'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            TripleEncoder.from_teachers(teachers)
    with pytest.raises(ValueError, match="`long_text`"):
        TripleEncoder(None, None, checkpoints["clip"], long_text="drop")
    with pytest.raises(ValueError, match="`dtype` is 'half-ish'"):
        TripleEncoder(None, None, checkpoints["clip"], dtype="half-ish")
    with pytest.raises(ValueError, match="`revisions`"):
        TripleEncoder(None, None, checkpoints["clip"], revisions={"clip": "main"})
    for role in ("image", "text", "cross"):
        with pytest.raises(OSError, match=rf"cannot load the {role} teacher '.*nothing' \(setting `teachers`\): "):
            TripleEncoder(**{"image": None, "text": None, "cross": None, role: str(tmp_path / "nothing")})


def test_a_model_of_another_kind_in_a_teachers_place_is_refused(checkpoints, tmp_path):
    set_seed(0)
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    llama = LlamaModel(LlamaConfig(**small, pad_token_id=0))
    t5 = T5Model(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    for model in (llama, t5):
        model.save_pretrained(tmp_path / type(model).__name__)
        save_tokenizer(tmp_path / type(model).__name__, 32)
    for role, path, item, message in (
        ("cross", checkpoints["bert"], "star", "is a BertModel, which does not embed .* dual encoder"),
        ("image", checkpoints["bert"], picture(0), "is a BertModel, which does not embed .* vision model"),
        ("text", checkpoints["dinov2"], "star", "is a Dinov2Model, which does not embed .* text encoder"),
        ("text", tmp_path / "T5Model", "star", "is a T5Model, which does not embed .* text encoder"),
        ("text", tmp_path / "LlamaModel", "star", "a LlamaModel, is pooled by its first token"),
        ("image", checkpoint("llava"), picture(0), "is a LlavaModel, which does not embed"),
        ("text", checkpoint("llava"), "star", "is a LlavaModel, which does not embed"),
    ):
        with pytest.raises(ValueError, match=rf"the {role} teacher '.*' \(setting `teachers`\),? {message}"):
            TripleEncoder.from_teachers({role: str(path)}, device="cpu").encode([item])


def test_incomplete_and_pickled_checkpoints_are_refused(checkpoints, tmp_path):
    path = Path(build_clip(tmp_path / "clip"))
    model = CLIPModel.from_pretrained(path)
    state = {key: value for key, value in model.state_dict().items() if key != "text_projection.weight"}
    model.save_pretrained(path, state_dict=state)
    with pytest.raises(ValueError, match="text_projection.weight"):
        TripleEncoder(None, None, str(path), device="cpu").encode(["star"])
    (path / "model.safetensors").unlink()
    torch.save(model.state_dict(), path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        TripleEncoder(None, None, str(path), device="cpu").encode(["star"])


def test_slices_that_cannot_be_embedded(encoder):
    with pytest.raises(ValueError, match=r"slices\[1\] is an empty text"):
        encoder.encode(["star", "  "])
    with pytest.raises(TypeError, match=r"slices\[0\] is a ndarray"):
        encoder.encode([np.zeros((3, 3, 3))])


def test_a_slice_without_a_definite_embedding_is_named(checkpoints, tmp_path):
    path = Path(build_clip(tmp_path / "clip"))
    model = CLIPModel.from_pretrained(path)
    for weight, dtype, found in (
        (float("nan"), "float32", "not finite in torch.float32"),
        (0.0, "float32", "zero in torch.float32"),
        (1e6, "float16", "not finite in torch.float16. Use dtype float32"),
    ):
        model.text_projection.weight.data = torch.full_like(model.text_projection.weight, weight)
        model.text_projection.weight.data[:, 0] *= 0.5  # what is normalised has a sum of zero
        model.save_pretrained(path)
        clip = TripleEncoder(None, None, str(path), device="cpu", dtype=dtype)
        match = rf"the question: the cross teacher '.*clip' \(setting `teachers`\) gives an embedding that is {found}"
        with pytest.raises(ValueError, match=match):
            clip.encode([picture(0), "star"], names=["the image", "the question"])
    # one slice among good ones
    encoder = TripleEncoder(checkpoints["dinov2"], None, None, device="cpu")
    assert encoder.dim == 16
    encoder._image.images = lambda images: torch.eye(3, 16) * torch.tensor([[1.0], [0.0], [1.0]])
    with pytest.raises(ValueError, match=r"slices\[1\]: the image teacher .* zero"):
        encoder.encode([picture(n) for n in range(3)])


# --- the cache


def row(*parts, **columns):
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "text": None} for p in parts]
    images = [part for part in parts if not isinstance(part, str)]
    return {"messages": [{"role": "user", "content": content}], "images": images, **columns}


def open_cache(directory, encoder):
    return TeacherCache.for_encoder(directory, encoder)


def test_cache_round_trip(encoder, tmp_path):
    slices = [TEXTS[0], picture(0), TEXTS[1], picture(1)]
    embeddings = encoder.encode(slices)
    cache = open_cache(tmp_path / "cache", encoder)
    assert not (tmp_path / "cache").exists()  # opening writes nothing
    cache.add(slices[:3], embeddings[:3])
    cache.add(slices[3:], embeddings[3:])
    for opened in (cache, open_cache(tmp_path / "cache", encoder)):
        assert len(opened) == 4 and slices[1] in opened and "star" not in opened
        found = opened.lookup([slices[i] for i in (3, 0, 0, 2, 1)])
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, embeddings[[3, 0, 0, 2, 1]], atol=5e-4, rtol=0)
        torch.testing.assert_close(found[:, :24].norm(dim=1), torch.ones(5), atol=1e-6, rtol=0)
        torch.testing.assert_close(found[:, 24:].norm(dim=1), torch.ones(5), atol=1e-6, rtol=0)
    shards = list((tmp_path / "cache").glob("shard-*.arrow"))
    tables = [datasets.Dataset.from_file(str(shard)) for shard in shards]
    assert sorted(map(len, tables)) == [1, 3] and tables[0].features["embedding"].length == 44
    assert {key for table in tables for key in table["key"]} == set(map(slice_key, slices))
    header = json.loads((tmp_path / "cache" / "cache.json").read_text())
    assert (header["dim"], header["split"], header["fingerprint"]) == (44, 24, encoder.fingerprint)


def test_cache_without_split_renormalises_the_whole_vector(tmp_path):
    cache = TeacherCache(tmp_path, "f", 3, None)
    cache.add(["a"], torch.tensor([[3.0, 0.0, 4.0]]))
    torch.testing.assert_close(cache.lookup(["a"]), torch.tensor([[0.6, 0.0, 0.8]]))


def test_float16_error_is_the_documented_one(tmp_path):
    torch.manual_seed(0)
    x = F.normalize(torch.randn(300, 2, 768, dtype=torch.float64), dim=-1)
    x = torch.cat([x, F.normalize(x + 0.01 * torch.randn_like(x), dim=-1)])
    cache = TeacherCache(tmp_path, "f", 1536, 768)
    names = [str(i) for i in range(600)]
    cache.add(names, x.flatten(1))
    found = cache.lookup(names).double().unflatten(1, (2, 768))
    for half in range(2):
        a, b = x[:, half], found[:, half]
        assert (a @ a.T - b @ b.T).abs().max() < 1e-4


def test_keys_name_the_content(tmp_path):
    image = picture(0)
    image.save(tmp_path / "same.png")
    assert slice_key(Image.open(tmp_path / "same.png")) == slice_key(image.copy())
    pixels = np.asarray(image)
    transposed_size = Image.fromarray(pixels.reshape(pixels.shape[1], pixels.shape[0], 3))  # equal bytes
    changed = pixels.copy()
    changed[-1, -1, -1] ^= 1
    others = [image, transposed_size, Image.fromarray(changed), "a", "a ", image.tobytes().decode("latin-1")]
    assert len({slice_key(item) for item in others}) == len(others)
    assert len(slice_key("é")) == 16


def test_missing_is_unique_and_ordered(encoder, tmp_path):
    cache = open_cache(tmp_path, encoder)
    cache.add(["star"], encoder.encode(["star"]))
    assert cache.missing(["b", "star", "a", "b", "c", "a"]) == ["b", "a", "c"]


def test_lookup_names_the_slice_that_lacks_an_embedding(encoder, tmp_path):
    cache = open_cache(tmp_path, encoder)
    cache.add(["star"], encoder.encode(["star"]))
    with pytest.raises(KeyError, match=r"slices\[1\], 'a red circle', has no embedding.*hf-sugar prepare"):
        cache.lookup(["star", "a red circle"])
    with pytest.raises(KeyError, match=r"an image of size \(20, 24\)"):
        cache.lookup([picture(0)])


def test_a_cache_of_other_teachers_is_refused(encoder, clip_only, checkpoints, tmp_path):
    cache = open_cache(tmp_path / "cache", encoder)
    cache.add(["star"], encoder.encode(["star"]))
    with pytest.raises(ValueError) as raised:
        open_cache(tmp_path / "cache", clip_only)
    message = str(raised.value)
    for part in (str(tmp_path / "cache"), encoder.description, clip_only.description, "another directory", "delete"):
        assert part in message
    with pytest.raises(ValueError, match="not the one of the teacher cache"):
        cache.fill([row("star")], clip_only)


def test_an_existing_cache_is_opened_without_the_weights(encoder, checkpoints, tmp_path, monkeypatch):
    open_cache(tmp_path, encoder).add(["star"], encoder.encode(["star"]))
    monkeypatch.setattr("hf_sugar.teachers.encoder.AutoModel", None)
    fresh = TripleEncoder(checkpoints["dinov2"], checkpoints["bert"], checkpoints["clip"], device="cpu")
    assert open_cache(tmp_path, fresh).lookup(["star"]).shape == (1, 44)


def test_damaged_caches(encoder, tmp_path):
    open_cache(tmp_path, encoder).add(["star"], encoder.encode(["star"]))
    (shard,) = tmp_path.glob("shard-*")
    content = shard.read_bytes()
    for damaged in (b"", b"damaged", content[:-100], content[: len(content) // 2]):
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{shard.name}.*damaged.*Delete this file"):
            open_cache(tmp_path, encoder)
    header = (tmp_path / "cache.json").read_bytes()
    for damaged in (b"", header[:30], b"[]", b"{}", header.replace(b"dim", b"dam"), header.replace(b"d", b"\xe9")):
        (tmp_path / "cache.json").write_bytes(damaged)
        with pytest.raises(ValueError, match="cache.json of the teacher cache is damaged"):
            open_cache(tmp_path, encoder)
    (tmp_path / "cache.json").unlink()
    with pytest.raises(ValueError, match="no cache.json"):
        open_cache(tmp_path, encoder)
    (tmp_path / "cache.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(ValueError, match="format version 99"):
        open_cache(tmp_path, encoder)


@pytest.mark.parametrize("indexed", [False, True])
def test_a_flipped_byte_is_detected_and_its_shard_named(tmp_path, indexed):
    """Every byte of a shard in turn: reading names the shard, or gives what was written."""
    names = ["a", "b", "c"]
    values = torch.nn.functional.normalize(torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    cache = TeacherCache(tmp_path, "f", 8, 4)
    cache.add(names, values.flatten(1))
    cache.add(["d"], values.flatten(1)[:1])
    if indexed:
        cache._write_index()
    expected = cache.lookup(names)
    shard = tmp_path / cache._shard_name(b"".join(map(slice_key, names)))
    content = shard.read_bytes()
    detected = []
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        shard.write_bytes(damaged)
        try:
            assert torch.equal(TeacherCache(tmp_path, "f", 8, 4).lookup(names), expected), place
        except ValueError as error:
            assert shard.name in str(error) and "is damaged" in str(error)
            detected.append(place)
    start = content.index(values.flatten(1).half().numpy().tobytes())
    assert set(range(start, start + 3 * 8 * 2)) <= set(detected)  # all of the embeddings


def test_a_damaged_index_is_made_again(encoder, tmp_path):
    open_cache(tmp_path, encoder).fill([row("star"), row("left")], encoder)
    (index,) = tmp_path.glob("*.index")
    content = bytearray(index.read_bytes())
    assert open_cache(tmp_path, encoder)._open == {}  # the index is enough
    for place in (0, 17, 40, len(content) - 1):
        index.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        assert "star" in open_cache(tmp_path, encoder) and "left" in open_cache(tmp_path, encoder)
    index.write_bytes(content[:-5])
    assert "star" in open_cache(tmp_path, encoder)


def test_damaged_records_of_blocks_are_left_out(encoder, tmp_path):
    rows = stories().select(range(4))
    expected = open_cache(tmp_path, encoder).fill(rows, encoder, rows_per_shard=2)
    blocks = tmp_path / "blocks.jsonl"
    content = blocks.read_bytes()
    for damaged in (b"\xff", b"5", b"[]", b"{}", b'{"block": "x"}', content.replace(b"rows", b"rovs")):
        blocks.write_bytes(damaged)
        assert open_cache(tmp_path, encoder).fill(rows, encoder, rows_per_shard=2) == expected | {"encoded": 0}


def test_a_write_that_fails_leaves_nothing(encoder, tmp_path, monkeypatch):
    cache = open_cache(tmp_path, encoder)
    cache.add(["star"], encoder.encode(["star"]))

    def torn(path, target):
        Path(path).write_bytes(b"first half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("hf_sugar.teachers.cache.os.replace", torn)
        with pytest.raises(OSError, match="disk full"):
            cache.add(["a"], encoder.encode(["a"]))
    assert "a" not in cache and "a" not in open_cache(tmp_path, encoder) and not list(tmp_path.glob(".*"))
    cache.add(["a"], encoder.encode(["a"]))
    assert "a" in open_cache(tmp_path, encoder)


def test_many_shards_keep_few_files_open(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_sugar.teachers.cache._MAX_OPEN_SHARDS", 3)
    names = [f"star {i}" for i in range(10)]
    cache = open_cache(tmp_path, encoder)
    cache.fill([row(name) for name in names], encoder, rows_per_shard=1)
    assert len(list(tmp_path.glob("shard-*"))) == 10
    assert torch.equal(cache.lookup(names), torch.cat([cache.lookup([name]) for name in names]))
    assert len(cache._open) == 3


def test_add_checks_its_arguments(encoder, tmp_path):
    cache = open_cache(tmp_path, encoder)
    with pytest.raises(ValueError, match=r"\(1, 44\), expected \(2, 44\)"):
        cache.add(["a", "b"], encoder.encode(["a"]))
    with pytest.raises(ValueError, match="not finite"):
        cache.add(["a"], torch.full((1, 44), float("nan")))


def test_fill_encodes_every_slice_once(encoder, tmp_path):
    rows = [row(picture(0), "star"), row("star", "a red circle", picture(0), picture(1)), row("a red circle")]
    cache = open_cache(tmp_path, encoder)
    counts = cache.fill(rows, encoder, rows_per_shard=1)
    assert counts == {"rows": 3, "skipped": 0, "slices": 7, "encoded": 4}
    slices = [picture(0), "star", "a red circle", picture(1)]
    torch.testing.assert_close(cache.lookup(slices), encoder.encode(slices), atol=5e-4, rtol=0)
    rows.append(row("left", "star"))
    counts = open_cache(tmp_path, encoder).fill(rows, encoder)
    assert counts == {"rows": 4, "skipped": 0, "slices": 9, "encoded": 1}


def test_fill_sees_what_another_process_wrote(encoder, tmp_path):
    rows = [row("star", picture(0)), row("a red circle")]
    first, second = open_cache(tmp_path, encoder), open_cache(tmp_path, encoder)
    assert first.fill(rows, encoder, rows_per_shard=1)["encoded"] == 3
    files = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert second.fill(rows, encoder) == {"rows": 2, "skipped": 0, "slices": 3, "encoded": 0}
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == files
    assert torch.equal(first.lookup(["star", picture(0)]), second.lookup(["star", picture(0)]))


def test_fill_takes_prompt_and_completion(encoder, tmp_path):
    part = {"type": "image", "text": None}
    sample = {
        "prompt": [{"role": "user", "content": [part, {"type": "text", "text": "left of"}]}],
        "completion": [{"role": "assistant", "content": [{"type": "text", "text": "star"}]}],
        "image": picture(0),
    }
    cache = open_cache(tmp_path, encoder)
    assert cache.fill([sample], encoder)["encoded"] == 3
    assert all(item in cache for item in (picture(0), "left of", "star"))


def test_fill_goes_on_after_a_kill(encoder, checkpoints, tmp_path):
    rows = [row(f"star {word}", picture(i)) for i, word in enumerate(["red", "blue", "left", "circle", "square"])]

    class Killed(TripleEncoder):
        calls = 0

        def encode(self, slices, **kwargs):
            self.calls += 1
            if self.calls == 3:
                raise KeyboardInterrupt
            return super().encode(slices, **kwargs)

    killed = Killed(checkpoints["dinov2"], checkpoints["bert"], checkpoints["clip"], device="cpu")
    with pytest.raises(KeyboardInterrupt):
        open_cache(tmp_path, killed).fill(rows, killed, rows_per_shard=1)
    cache = open_cache(tmp_path, encoder)
    assert len(cache) == 4
    assert cache.fill(rows, encoder)["encoded"] == 6
    slices = [item for r in rows for item in row_slices(r)]
    torch.testing.assert_close(cache.lookup(slices), encoder.encode(slices), atol=5e-4, rtol=0)


@pytest.mark.parametrize("streaming", [False, True])
def test_fill_names_or_skips_bad_rows(encoder, tmp_path, caplog, streaming):
    features = datasets.Features(
        {
            "messages": [
                {
                    "role": datasets.Value("string"),
                    "content": [{"type": datasets.Value("string"), "text": datasets.Value("string")}],
                }
            ],
            "images": datasets.List(datasets.Image()),
            "id": datasets.Value("string"),
        }
    )
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    good = tmp_path / "good.png"
    picture(0).save(good)
    part = {"type": "image", "text": None}
    rows = [
        {**row("star", id="a:0"), "images": []},
        {"messages": [{"role": "user", "content": [part]}], "images": [str(broken)], "id": "a:1"},
        {"messages": [{"role": "user", "content": [part]}], "images": [str(good)], "id": "a:2"},
        {"messages": [{"role": "user", "content": [part]}], "images": [], "id": "a:3"},
    ]
    dataset = datasets.Dataset.from_list(rows, features=features)
    if streaming:
        dataset = dataset.to_iterable_dataset()
    cache = open_cache(tmp_path / "cache", encoder)
    with pytest.raises(ValueError, match=r"row 1 \(a:1\), images\[0\].*broken.png.*cannot be decoded"):
        cache.fill(dataset, encoder)
    with caplog.at_level(logging.WARNING, logger="hf_sugar"):
        counts = cache.fill(dataset, encoder, on_row_error="skip")
    assert counts == {"rows": 4, "skipped": 2, "slices": 2, "encoded": 2}
    assert picture(0) in cache
    messages = [record.getMessage() for record in caplog.records]
    assert "row 1 (a:1)" in messages[0] and "row 3 (a:3)" in messages[1] and messages[2] == "Skipped 2 of 4 rows."
    with pytest.raises(ValueError, match="on_row_error"):
        cache.fill(dataset, encoder, on_row_error="ignore")


def test_fill_reports_truncation_once(encoder, tmp_path, caplog):
    rows = [row(" ".join(["star"] * n)) for n in (3, 11, 12, 13, 12)]
    with caplog.at_level(logging.WARNING, logger="hf_sugar"):
        open_cache(tmp_path, encoder).fill(rows, encoder, rows_per_shard=2)
    (record,) = caplog.records
    assert "Of 4 texts" in record.getMessage() and "3 than the 12 tokens of the cross teacher" in record.getMessage()


# --- several processes, kills

WORKER = """
import sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import test_teachers as t
from hf_sugar.teachers import TeacherCache, TripleEncoder
encoder = TripleEncoder(*sys.argv[3:6], device="cpu", batch_size=3)
counts = TeacherCache.for_encoder(sys.argv[2], encoder).fill(t.stories(sys.argv[6] == "stream"), encoder, rows_per_shard=8)
print("COUNTS", dict(counts))
"""


def stories(streaming: bool = False) -> datasets.Dataset | datasets.IterableDataset:
    """80 rows, whose slices recur near and far."""
    features = datasets.Features(
        {
            "messages": [
                {
                    "role": datasets.Value("string"),
                    "content": [{"type": datasets.Value("string"), "text": datasets.Value("string")}],
                }
            ],
            "images": datasets.List(datasets.Image()),
        }
    )
    rows = [
        row(f"star {'red ' * (i % 9)}", picture(i % 50), f"left {i}", "circle", picture(200 + i)) for i in range(80)
    ]
    dataset = datasets.Dataset.from_list(rows, features=features)
    return dataset.to_iterable_dataset(num_shards=2) if streaming else dataset


def start_worker(directory, checkpoints, mode="map", launch=()) -> subprocess.Popen:
    paths = [checkpoints[name] for name in ("dinov2", "bert", "clip")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    (script := Path(paths[0]).parent / "worker.py").write_text(WORKER)
    command = [sys.executable, *launch, str(script), str(Path(__file__).parent), str(directory), *paths, mode]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def counts_of(worker: subprocess.Popen) -> dict[str, int]:
    out, errors = worker.communicate(timeout=120)
    assert worker.returncode == 0, errors[-3000:]
    return ast.literal_eval(out.split("COUNTS ")[1].splitlines()[0])


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("shard-*")}


@pytest.fixture(scope="module")
def uninterrupted(encoder, tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    counts = open_cache(directory, encoder).fill(stories(), encoder, rows_per_shard=8)
    assert counts == {"rows": 80, "skipped": 0, "slices": 400, "encoded": 80 + 9 + 80 + 1 + 50}
    return directory


def test_two_ranks_write_what_one_process_writes(uninterrupted, checkpoints, tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    counts = counts_of(start_worker(tmp_path, checkpoints, launch=launch))
    assert counts == {"rows": 80, "skipped": 0, "slices": 400, "encoded": 220}
    assert content(tmp_path) == content(uninterrupted)
    assert len((tmp_path / "blocks.jsonl").read_text().split()) > 10 and not list(tmp_path.glob(".*"))


def test_two_runs_at_once_write_what_one_writes(uninterrupted, checkpoints, tmp_path):
    workers = [start_worker(tmp_path, checkpoints, mode) for mode in ("map", "stream")]
    encoded = [counts_of(worker)["encoded"] for worker in workers]
    assert content(tmp_path) == content(uninterrupted) and sum(encoded) >= 220


def kill_and_go_on(uninterrupted, checkpoints, encoder, directory, kills, seed):
    """Kill when another number of shards is there, and some time after; each time a shard at most is lost."""
    random = np.random.RandomState(seed)
    for kill in range(kills):
        before = len(content(directory))
        worker = start_worker(directory, checkpoints)
        while worker.poll() is None and len(content(directory)) == before:
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.02))
        worker.kill()
        worker.communicate()
        assert content(directory).items() <= content(uninterrupted).items()
        assert len(content(directory)) > before or before == len(content(uninterrupted)), kill
    counts = open_cache(directory, encoder).fill(stories(), encoder, rows_per_shard=8)
    assert (counts["rows"], counts["slices"]) == (80, 400)
    assert content(directory) == content(uninterrupted)


def test_a_run_that_is_killed_goes_on_to_the_same_bytes(uninterrupted, checkpoints, encoder, tmp_path):
    kill_and_go_on(uninterrupted, checkpoints, encoder, tmp_path, 2, 0)


@pytest.mark.extras
def test_ten_kills(uninterrupted, checkpoints, encoder, tmp_path):
    kill_and_go_on(uninterrupted, checkpoints, encoder, tmp_path, 10, 1)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_second_run_does_not_look_at_finished_rows(uninterrupted, encoder, tmp_path, monkeypatch, streaming):
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    with monkeypatch.context() as patch:
        patch.setattr("hf_sugar.teachers.cache.load_image", None)
        counts = open_cache(tmp_path, encoder).fill(stories(streaming), encoder, rows_per_shard=8)
    assert counts == {"rows": 80, "skipped": 0, "slices": 400, "encoded": 0}
    # another row among them
    rows = stories().to_list()
    rows[20]["messages"][0]["content"][0]["text"] = "another"
    changed = datasets.Dataset.from_list(rows, features=stories().features)
    assert open_cache(tmp_path, encoder).fill(changed, encoder, rows_per_shard=8)["encoded"] == 1
    # a shard deleted
    lost = next(iter(content(uninterrupted)))
    (tmp_path / lost).unlink()
    assert open_cache(tmp_path, encoder).fill(stories(streaming), encoder, rows_per_shard=8)["encoded"] > 0
    assert content(tmp_path)[lost] == content(uninterrupted)[lost]


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_without_structure_loss_are_not_embedded(encoder, tmp_path, streaming):
    rows = stories().select(range(6)).add_column("structure", [False] * 5 + [True])
    counts = open_cache(tmp_path, encoder).fill(rows.to_iterable_dataset() if streaming else rows, encoder)
    assert counts["rows"] == 6 and counts["slices"] == 5


def test_a_changed_image_file_is_seen(encoder, tmp_path):
    picture(0).save(tmp_path / "a.png")
    features = stories().features
    rows = [{**row("star", picture(0)), "images": [str(tmp_path / "a.png")]}]
    cache = open_cache(tmp_path / "cache", encoder)
    assert cache.fill(datasets.Dataset.from_list(rows, features=features), encoder)["encoded"] == 2
    picture(1, 40, 40).save(tmp_path / "a.png")
    assert cache.fill(datasets.Dataset.from_list(rows, features=features), encoder)["encoded"] == 1
    assert picture(0) in cache and picture(1, 40, 40) in cache


# --- rows and images


def test_row_slices_in_reading_order():
    a, b = picture(0), picture(1)
    image = {"type": "image", "text": None}
    sample = {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {
                "role": "user",
                "content": [{"type": "text", "text": "first"}, image, {"type": "text", "text": "second"}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "third"}, image]},
        ],
        "images": [a, b],
    }
    assert row_slices(sample) == ["first", a, "second", "third", b]
    strings = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "question"},
            {"role": "assistant", "content": "answer"},
            {"role": "user", "content": "again"},
        ],
        "images": [a, b],
    }
    assert row_slices(strings) == [a, b, "question", "answer", "again"]
    assert row_slices({"messages": strings["messages"]}) == ["question", "answer", "again"]
    assert row_slices({"messages": strings["messages"], "images": None}) == ["question", "answer", "again"]


def test_string_content_agrees_with_trl():
    from trl.data_utils import prepare_multimodal_messages

    images = [picture(0), picture(1)]
    messages = [
        {"role": "user", "content": "question"},
        {"role": "assistant", "content": "answer"},
        {"role": "user", "content": "again"},
    ]
    prepared = prepare_multimodal_messages(messages, images)
    expected = [part["image"] if part["type"] == "image" else part["text"] for m in prepared for part in m["content"]]
    assert row_slices({"messages": messages, "images": images}) == expected


@pytest.mark.parametrize(
    ("messages", "images", "match"),
    [
        (
            [{"role": "user", "content": [{"type": "image"}]}],
            [],
            r"row 7 \(x\), `images`: holds 0 images but `messages` has 1",
        ),
        (
            [{"role": "user", "content": "q"}, {"role": "human", "content": "a"}],
            [],
            r"`messages\[1\].role`: is 'human'",
        ),
        ([{"content": "q"}], [], "role`: is None"),
        ([{"role": "user", "content": [{"type": "video"}]}], [], r"`messages\[0\].content\[0\].type`: is 'video'"),
        ([{"role": "user", "content": [{"type": "text", "text": " \n"}]}], [], r"content\[0\].text`: is empty"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], [], "is empty"),
        ([{"role": "user", "content": ""}], [], "content`: is empty"),
        ([{"role": "assistant", "content": "a"}], ["x.png"], "holds 1 images but `messages` has 0"),
        (
            [{"role": "user", "content": "q"}],
            ["x.png"],
            r"row 7 \(x\), images\[0\]: image file 'x.png' does not exist",
        ),
    ],
)
def test_row_errors_name_the_place(messages, images, match):
    sample = {"messages": messages, "images": images, "id": "x"}
    with pytest.raises(ValueError, match=match):
        row_slices(sample, row_name(sample, 7))


def test_row_name():
    assert row_name({"id": "a.json:3"}, 5) == "row 5 (a.json:3)"
    assert row_name({}, 5) == row_name({"id": None}, 5) == "row 5"


def test_load_image_takes_every_form(tmp_path):
    image = picture(0)
    path = tmp_path / "a.png"
    image.save(path)
    content = path.read_bytes()
    forms = [image, Image.open(path), path, str(path), content, {"bytes": content, "path": None}]
    forms += [{"bytes": None, "path": str(path)}, {"path": str(path)}, {"bytes": content}]
    for form in forms:
        loaded = load_image(form)
        assert loaded.mode == "RGB" and loaded.tobytes() == image.tobytes()
    assert load_image(image) is image


@pytest.mark.parametrize("form", ["path", "opened"])
def test_load_image_applies_the_exif_orientation(tmp_path, form):
    exif = Image.Exif()
    exif[Image.ExifTags.Base.Orientation] = 6  # to be turned by 90 degrees clockwise
    path = tmp_path / "a.png"
    picture(0, 20, 24).save(path, exif=exif)
    loaded = load_image(path if form == "path" else Image.open(path))
    assert loaded.size == (24, 20)
    assert np.array_equal(np.asarray(loaded), np.rot90(np.asarray(picture(0, 20, 24)), -1))


def test_load_image_modes(tmp_path):
    def pixel(image):
        loaded = load_image(image)
        assert loaded.mode == "RGB"
        return loaded.getpixel((0, 0))

    assert pixel(Image.new("1", (2, 2), 1)) == (255, 255, 255)
    assert pixel(Image.new("L", (2, 2), 7)) == (7, 7, 7)
    assert pixel(Image.new("RGBA", (2, 2), (255, 0, 0, 0))) == (255, 255, 255)
    assert pixel(Image.new("RGBA", (2, 2), (255, 0, 0, 255))) == (255, 0, 0)
    assert pixel(Image.new("RGBA", (2, 2), (0, 0, 0, 51))) == (204, 204, 204)
    assert pixel(Image.new("LA", (2, 2), (0, 0))) == (255, 255, 255)
    assert pixel(Image.new("CMYK", (2, 2), (0, 255, 255, 0))) == (255, 0, 0)
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert pixel(palette) == (10, 20, 30)
    palette.info["transparency"] = 1
    assert pixel(palette) == (255, 255, 255)
    # 16 bits, in memory and through a file
    grey = Image.fromarray(np.full((2, 2), 0x8040, dtype=np.uint16))
    grey.save(tmp_path / "grey.png")
    assert pixel(grey) == pixel(tmp_path / "grey.png") == (0x80, 0x80, 0x80)
    assert pixel(Image.fromarray(np.full((2, 2), 100, dtype=np.uint16))) == (0, 0, 0)
    assert pixel(Image.fromarray(np.full((2, 2), 0x8040, dtype=np.int32))) == (0x80, 0x80, 0x80)
    assert pixel(Image.fromarray(np.full((2, 2), 100, dtype=np.int32))) == (100, 100, 100)
    for bad in (
        np.full((2, 2), 70000, dtype=np.int32),
        np.full((2, 2), -1, dtype=np.int32),
        np.zeros((2, 2), np.float32),
    ):
        with pytest.raises(ValueError, match="scale them to 8 bits"):
            load_image(Image.fromarray(bad))


def test_load_image_errors_name_the_place_and_the_remedy(tmp_path, monkeypatch):
    broken, cut, good = tmp_path / "broken.jpg", tmp_path / "cut.png", tmp_path / "good.png"
    broken.write_bytes(b"text")
    picture(0, 100, 100).save(good)
    cut.write_bytes(good.read_bytes()[:5000])
    for image, match in [
        (tmp_path / "none.png", r"row 3: image file .*none.png' does not exist.*Correct the path"),
        (broken, r"row 3: image file .*broken.jpg' cannot be decoded.*Replace the file or drop the row"),
        (cut, r"row 3: image file .*cut.png' cannot be decoded"),
        (Image.open(cut), "row 3: image of mode RGB .* cannot be decoded"),
        (b"text", "row 3: image of 4 bytes cannot be decoded"),
        ("https://example.org/a.jpg", "row 3: .* is a web address.*Download"),
        (None, "row 3: expected a PIL image.*got None"),
        ({"bytes": None, "path": None}, "row 3: expected a PIL image"),
        (np.zeros((2, 2, 3)), "row 3: .*got ndarray"),
    ]:
        with pytest.raises(ValueError, match=match):
            load_image(image, "row 3")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"row 3: .*good.png' is too large.*MAX_IMAGE_PIXELS"):
        load_image(good, "row 3")
