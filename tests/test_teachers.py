import gc
import io
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import time
import weakref
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
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
from hf_sugar.cli.main import main
from hf_sugar.data import load_data, row_slices
from hf_sugar.models import SugarProcessor
from hf_sugar.teachers import TripleEncoder, add_teacher_embeddings, teachers_of
from hf_sugar.training import SugarCollator
from hf_sugar.world import checkpoint


TEXTS = ["a red circle", "a small blue square left of a star", "star", "a red circle and a small star left of it"]


def picture(seed: int, width: int = 20, height: int = 24) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    image.save(file := io.BytesIO(), "PNG")
    return file.getvalue()


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
    monkeypatch.setattr("hf_sugar.teachers.checkpoint.AutoModel", None)
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
    monkeypatch.setattr("hf_sugar.teachers.encoder.Teacher", lambda role, path, *args: paths.append((role, path)))
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


# --- the column


def row(*parts, **columns):
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "text": None} for p in parts]
    images = [part for part in parts if not isinstance(part, str)]
    return {"messages": [{"role": "user", "content": content}], "images": images, **columns}


TEXT_PARTS = datasets.List({"type": datasets.Value("string"), "text": datasets.Value("string")})
FEATURES = datasets.Features(
    {
        "messages": datasets.List({"role": datasets.Value("string"), "content": TEXT_PARTS}),
        "images": datasets.List(datasets.Image()),
        "id": datasets.Value("string"),
    }
)


def stories(first: int = 0, count: int = 40) -> datasets.Dataset:
    """Rows of five slices, some of which recur."""
    rows = [
        row(f"star {'red ' * (i % 9)}", picture(i % 25), f"left {i}", "circle", picture(200 + i), id=f"s:{i}")
        for i in range(first, first + count)
    ]
    return datasets.Dataset.from_list(rows, features=FEATURES)


class Recording:
    """An encoder that keeps what it is asked for, and stops at a call."""

    def __init__(self, encoder, stop_at=None):
        self.encoder, self.stop_at, self.calls = encoder, stop_at, []

    def __getattr__(self, name):
        return getattr(self.encoder, name)

    def encode(self, slices, **kwargs):
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        self.calls.append(list(slices))
        return self.encoder.encode(slices, **kwargs)


def add(dataset, encoder, directory, **kwargs):
    return add_teacher_embeddings(dataset, encoder, directory, **{"rows_per_shard": 8, **kwargs})


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("shard-*")}


@pytest.fixture(scope="module")
def uninterrupted(encoder, tmp_path_factory):
    """The directory, the dataset and what the encoder was asked for."""
    directory, recording = tmp_path_factory.mktemp("uninterrupted"), Recording(encoder)
    return directory, add(stories(), recording, directory), recording.calls


@pytest.fixture(scope="module")
def expected(encoder):
    """The embeddings of each row of `stories()`, by its id."""
    return {row["id"]: encoder.encode(row_slices(row)) for row in stories()}


def assert_rows(dataset, expected, count):
    found = 0
    for row in dataset:
        values = torch.tensor(np.array(row["teacher_embeddings"], dtype=np.float32))
        torch.testing.assert_close(values, expected[row["id"]], atol=5e-4, rtol=0)
        assert row["messages"][0]["content"][2]["text"] == f"left {row['id'][2:]}"
        found += 1
    assert found == count


def test_the_column_holds_the_embeddings_of_each_row(uninterrupted, expected, encoder):
    directory, dataset, calls = uninterrupted
    assert_rows(dataset, expected, 40)
    assert dataset.features["teacher_embeddings"] == datasets.List(datasets.List(datasets.Value("float16"), length=44))
    assert set(dataset["teachers"]) == {encoder.record} and teachers_of(dataset) == json.loads(encoder.record)
    assert json.loads(encoder.record)["split"] == 24 and str(directory.parent) not in encoder.record
    shards = [datasets.Dataset.from_file(str(path)) for path in directory.glob("shard-*")]
    assert sum(map(len, shards)) == 40 and max(map(len, shards)) <= 8 and len(calls) == len(shards) < 20
    for call in calls:  # equal slices of a block once
        names = [item if isinstance(item, str) else item["bytes"] for item in call]
        assert len(names) == len(set(names)) and names.count("circle") == 1


def test_order_mixture_and_selection_change_nothing(uninterrupted, expected, encoder, tmp_path):
    directory = shutil.copytree(uninterrupted[0], tmp_path / "copy")
    nothing = Recording(encoder, stop_at=0)
    for count, dataset in (
        (40, stories().shuffle(seed=0)),
        (10, stories().shuffle(seed=1).select(range(3, 13))),
        (3, stories().select([39, 4, 4])),
        (40, datasets.concatenate_datasets([stories(20, 20), stories(0, 20)])),
        (20, stories().filter(lambda row: int(row["id"][2:]) % 2)),
    ):
        assert_rows(add(dataset, nothing, directory), expected, count)
    probabilities = {"probabilities": [0.3, 0.7], "seed": 3, "stopping_strategy": "all_exhausted"}
    mixed = datasets.interleave_datasets([stories(0, 10), stories(10, 30)], **probabilities)
    assert len(mixed) > 40
    assert_rows(add(mixed, nothing, directory), expected, len(mixed))
    # another source before it: its blocks end where they ended
    before = content(directory)
    recording = Recording(encoder)
    both = add(datasets.concatenate_datasets([stories(100, 13), stories()]), recording, directory)
    assert sum(len(call) for call in recording.calls) <= 13 * 5
    assert len(content(directory)) - len(before) < 8
    assert_rows(both.select(range(13, 53)), expected, 40)


def test_what_changed_is_embedded_again(uninterrupted, encoder, tmp_path):
    directory = shutil.copytree(uninterrupted[0], tmp_path / "copy")
    rows = stories().to_list()
    rows[20]["messages"][0]["content"][0]["text"] = "another"
    recording = Recording(encoder)
    add(datasets.Dataset.from_list(rows, features=FEATURES), recording, directory)
    assert [len(call) for call in recording.calls] == [5]
    # a file of another content
    file = tmp_path / "a.png"
    picture(0).save(file)
    rows = datasets.Dataset.from_list(
        [{**row("star", picture(0)), "images": [str(file)], "id": "f"}], features=FEATURES
    )
    first = add(rows, recording, directory)[0]["teacher_embeddings"]
    picture(1, 40, 40).save(file)
    again = add(rows, recording, directory)[0]["teacher_embeddings"]
    assert len(recording.calls) == 3 and first[0] == again[0] and first[1] != again[1]


def test_streams(uninterrupted, expected, encoder, tmp_path):
    nothing = Recording(encoder, stop_at=0)
    stream = stories().to_iterable_dataset(num_shards=4)
    for dataset in (stream, stream.shuffle(seed=0, buffer_size=20)):
        assert_rows(add(dataset, nothing, uninterrupted[0], compute=False), expected, 40)
    directory, recording = tmp_path / "of-a-stream", Recording(encoder)
    assert_rows(add(stream, recording, directory), expected, 40)
    assert len(recording.calls) == 5
    assert_rows(add(stories(), nothing, directory), expected, 40)
    others = stories(200, 3).to_iterable_dataset()
    with pytest.raises(ValueError, match="the row s:200 has no teacher_embeddings in .* `hf-sugar prepare`"):
        next(iter(add(others, nothing, directory, compute=False)))
    with pytest.raises(ValueError, match="holds no teacher_embeddings, and a streaming dataset is not read .*online"):
        add(others, nothing, tmp_path / "empty", compute=False)


def test_the_result_is_an_ordinary_dataset(uninterrupted, expected, encoder, tmp_path):
    """Saved, mixed, streamed: what a training reads is the same, with no teacher and no directory."""
    dataset = uninterrupted[1]
    dataset.save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "rows.parquet")
    parquet = str(tmp_path / "rows.parquet")
    kept = dict(split="train", cache_dir=str(tmp_path / "cache"))
    for loaded in (
        datasets.load_from_disk(str(tmp_path / "saved")),
        datasets.load_dataset("parquet", data_files=parquet, **kept),
        datasets.load_dataset("parquet", data_files=parquet, split="train", streaming=True),
        pickle.loads(pickle.dumps(dataset)),
        datasets.concatenate_datasets([dataset.select(range(30)), dataset.select(range(30, 40))]).shuffle(seed=0),
    ):
        assert_rows(loaded, expected, 40)
        assert teachers_of(loaded)["fingerprint"] == encoder.fingerprint
        assert add_teacher_embeddings(loaded, encoder, tmp_path / "unused") is loaded
    assert not (tmp_path / "unused").exists()
    # rows in memory are pickled once, not once a block
    assert len(pickle.dumps(dataset)) < 1.5 * len(pickle.dumps(stories()))


def test_embeddings_of_other_teachers_are_refused(uninterrupted, encoder, clip_only, tmp_path):
    directory, dataset, _ = uninterrupted
    with pytest.raises(ValueError) as raised:
        add(stories(), clip_only, directory)
    for words in (str(directory), encoder.description, clip_only.description, "another directory", "delete"):
        assert words in str(raised.value)
    with pytest.raises(
        ValueError, match=r"(?s)other teachers.*there: .*image=dinov2@.*asked for: cross=.*remove_columns"
    ):
        add(dataset, clip_only, tmp_path)
    two = datasets.Dataset.from_dict({"teacher_embeddings": [[], []], "teachers": [encoder.record, clip_only.record]})
    with pytest.raises(ValueError, match="other teachers"):
        teachers_of(two)
    some = datasets.concatenate_datasets([dataset, stories()])
    with pytest.raises(ValueError, match="Some rows .* have teacher embeddings and others have none"):
        teachers_of(some)


def test_a_warm_start_reads_no_weights(uninterrupted, expected, checkpoints, monkeypatch):
    monkeypatch.setattr("hf_sugar.teachers.checkpoint.AutoModel", None)
    fresh = TripleEncoder(checkpoints["dinov2"], checkpoints["bert"], checkpoints["clip"], device="cpu")
    assert_rows(add(stories(), fresh, uninterrupted[0]), expected, 40)


def test_damaged_files_are_named(uninterrupted, encoder, tmp_path):
    directory = shutil.copytree(uninterrupted[0], tmp_path / "copy")
    shard = next(iter(sorted(directory.glob("shard-*"))))
    whole = shard.read_bytes()
    shorter = datasets.Dataset.from_file(str(shard)).data.table.slice(1)
    with pa.OSFile(str(tmp_path / "short"), "wb") as file, pa.ipc.new_stream(file, shorter.schema) as stream:
        stream.write_table(shorter)
    for damaged in (b"", b"damaged", whole[: len(whole) // 2], whole[:-200], (tmp_path / "short").read_bytes()):
        shard.unlink()  # what is mapped stays as it was
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{shard.name} is damaged.*Delete it"):
            add(stories(), encoder, directory)
    shard.unlink()
    assert_rows(
        add(stories(), encoder, directory), {row["id"]: encoder.encode(row_slices(row)) for row in stories()}, 40
    )
    for damaged in (b"", b"{", b"[]", b"{}", b"\xe9"):
        (directory / "teacher_embeddings.json").write_bytes(damaged)
        with pytest.raises(ValueError, match="teacher_embeddings.json, which says what made .* cannot be read"):
            add(stories(), encoder, directory)


def test_a_write_that_fails_leaves_nothing(encoder, tmp_path, monkeypatch):
    def torn(path, target):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("hf_sugar.data.columns.os.replace", torn)
        with pytest.raises(OSError, match="disk full"):
            add(stories(0, 2), encoder, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_embeds_one_block_again(uninterrupted, expected, encoder, tmp_path):
    stopped = Recording(encoder, stop_at=3)
    with pytest.raises(KeyboardInterrupt):
        add(stories(), stopped, tmp_path)
    assert content(tmp_path).items() <= content(uninterrupted[0]).items() and len(content(tmp_path)) == 3
    rest = Recording(encoder)
    assert_rows(add(stories(), rest, tmp_path), expected, 40)
    assert len(rest.calls) == len(uninterrupted[2]) - 3
    assert content(tmp_path) == content(uninterrupted[0])


WORKER = """
import datasets, sys, torch
from hf_sugar.teachers import TripleEncoder, add_teacher_embeddings
torch.set_num_threads(1)
encoder = TripleEncoder(*sys.argv[3:], device="cpu", batch_size=3)
add_teacher_embeddings(datasets.load_from_disk(sys.argv[1]), encoder, sys.argv[2], rows_per_shard=8)
"""


@pytest.fixture
def start_worker(checkpoints, tmp_path_factory):
    """Starts a process that writes the shards of `stories()`."""
    place = tmp_path_factory.mktemp("worker")
    stories().save_to_disk(place / "rows")
    (place / "worker.py").write_text(WORKER)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}

    def start(directory):
        paths = [checkpoints[name] for name in ("dinov2", "bert", "clip")]
        command = [sys.executable, str(place / "worker.py"), str(place / "rows"), str(directory), *paths]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    return start


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.extras)])
def test_a_run_that_is_killed_goes_on_to_the_same_bytes(uninterrupted, start_worker, encoder, tmp_path, kills):
    """Killed when another shard is there, and some time after."""
    random, whole = np.random.RandomState(kills), content(uninterrupted[0])
    for _ in range(kills):
        before = len(content(tmp_path))
        worker = start_worker(tmp_path)
        while worker.poll() is None and len(content(tmp_path)) == before:
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.02))
        worker.kill()
        worker.communicate()
        assert content(tmp_path).items() <= whole.items() and (len(content(tmp_path)) > before or before == len(whole))
    add(stories(), encoder, tmp_path)
    assert content(tmp_path) == whole


def test_rows_of_every_layout(encoder, tmp_path):
    part = {"type": "image", "text": None}
    rows = datasets.Dataset.from_list(
        [
            {
                "prompt": [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}]
                + [{"role": "user", "content": [part, {"type": "text", "text": "left of"}]}],
                "completion": [{"role": "assistant", "content": [{"type": "text", "text": "star"}]}],
                "image": {"bytes": png(picture(0)), "path": None},
            }
        ],
        features=datasets.Features(
            {
                "prompt": FEATURES["messages"],
                "completion": FEATURES["messages"],
                "image": datasets.Image(),
            }
        ),
    )
    [values] = add(rows, encoder, tmp_path)["teacher_embeddings"]
    torch.testing.assert_close(
        torch.tensor(values), encoder.encode([picture(0), "left of", "star"]), atol=5e-4, rtol=0, check_dtype=False
    )
    kept_out = stories(0, 2).add_column("structure", [False, True])
    recording = Recording(encoder)
    assert list(map(len, add(kept_out, recording, tmp_path)["teacher_embeddings"])) == [0, 5]
    assert sum(map(len, recording.calls)) == 5


def test_a_row_that_cannot_be_embedded_is_named(encoder, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    rows = stories(0, 3).to_list()
    rows[1]["images"][1] = {"path": str(tmp_path / "broken.png"), "bytes": None}
    with pytest.raises(ValueError, match=r"row 1 \(s:1\), images\[1\]: .*broken.png.*cannot be decoded"):
        add(datasets.Dataset.from_list(rows, features=FEATURES), encoder, tmp_path)
    rows[1] = {**row("star", "  "), "id": "s:1"}
    for dataset in (datasets.Dataset.from_list(rows, features=FEATURES).select([2, 1, 0]), None):
        dataset = dataset or datasets.Dataset.from_list(rows, features=FEATURES).to_iterable_dataset()
        with pytest.raises(ValueError, match=r"row 1 \(s:1\).*is empty"):
            add(dataset, encoder, tmp_path)


def test_long_texts_are_reported_once(encoder, tmp_path, caplog):
    rows = datasets.Dataset.from_list([row(" ".join(["star"] * n)) for n in (3, 11, 12, 13)])
    with caplog.at_level(logging.WARNING, logger="hf_sugar"):
        add(rows, encoder, tmp_path, rows_per_shard=1)
    (record,) = caplog.records
    assert "Of 4 texts" in record.getMessage() and "3 than the 12 tokens of the cross teacher" in record.getMessage()


def test_float16_error_is_the_documented_one():
    torch.manual_seed(0)
    x = F.normalize(torch.randn(300, 2, 768, dtype=torch.float64), dim=-1)
    x = torch.cat([x, F.normalize(x + 0.01 * torch.randn_like(x), dim=-1)])
    for half in range(2):
        a, b = x[:, half], F.normalize(x[:, half].half().double(), dim=-1)
        assert (a @ a.T - b @ b.T).abs().max() < 1e-4


# --- what reads the column


@pytest.fixture(scope="module")
def processor():
    return SugarProcessor.from_pretrained(checkpoint("llava"))


def test_the_collator_reads_the_column(uninterrupted, encoder, processor):
    """As if the teachers were asked, in every order of the rows and both of a caption."""
    captions = [row(picture(n), f"star {n}", id=f"c:{n}", loss_on="captions", structure=True) for n in range(6)]
    features = datasets.Features(
        {**FEATURES, "loss_on": datasets.Value("string"), "structure": datasets.Value("bool")}
    )
    stored = [{**sample, "loss_on": "text", "structure": n != 1} for n, sample in enumerate(stories(0, 3))]
    rows = datasets.Dataset.from_list(captions + stored, features=features)
    rows = add(rows, encoder, uninterrupted[0].parent / "collated").shuffle(seed=0)
    online = SugarCollator(processor, embed_slices=encoder.encode, flip_captions=True)(list(rows))
    for dataset in (rows, rows.with_format("numpy", columns=["teacher_embeddings"], output_all_columns=True)):
        batch = SugarCollator(processor, teachers=encoder.record, flip_captions=True)(list(dataset))
        assert batch.keys() == online.keys()
        for name, value in online.items():
            torch.testing.assert_close(batch[name], value, atol=5e-4, rtol=0)
        first, second = batch["teacher_embeddings"][batch["slice_modality"] >= 0].split([24, 20], dim=1)
        torch.testing.assert_close(first.norm(dim=1), torch.ones(len(first)), atol=1e-6, rtol=0)
        torch.testing.assert_close(second.norm(dim=1), torch.ones(len(first)), atol=1e-6, rtol=0)
    modality = batch["slice_modality"]
    captions = (modality >= 0).sum(1) == 2
    assert {tuple(kinds) for kinds in modality[captions, :2].tolist()} == {(TEXT, IMAGE), (IMAGE, TEXT)}


def test_the_collator_refuses_a_column_that_does_not_fit(uninterrupted, encoder, clip_only, processor):
    samples = [{**sample, "loss_on": "text"} for sample in uninterrupted[1].select(range(2))]
    collator = SugarCollator(processor, teachers=encoder.record)
    values = np.array(samples[1]["teacher_embeddings"])
    for change, message in (
        ({"teacher_embeddings": None}, "Row s:1 has no `teacher_embeddings`. Run `hf-sugar prepare`"),
        ({"teacher_embeddings": values[:3]}, "Row s:1 has 3 `teacher_embeddings` for 5 slices: it was changed"),
        ({"teacher_embeddings": values * 0.9}, "Row s:1 .* not of length one"),
        ({"teacher_embeddings": values * np.nan}, "Row s:1 .* not of length one"),
        ({"teachers": clip_only.record}, "(?s)other teachers.*there: +cross=.*asked for: +image="),
    ):
        with pytest.raises(ValueError, match=message):
            collator([samples[0], {**samples[1], **change}])


def test_prepare(encoder, checkpoints, tmp_path, capsys, caplog):
    records = []
    for n in range(4):
        picture(n).save(tmp_path / f"{n}.png")
        turns = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": f"star {n}"}]
        records.append({"image": f"{n}.png", "conversations": turns})
    (tmp_path / "rows.json").write_text(json.dumps(records))
    teachers = {"image": checkpoints["dinov2"], "text": checkpoints["bert"], "cross": checkpoints["clip"]}
    command = ["prepare", "--train_data", str(tmp_path / "rows.json"), "--teachers", json.dumps(teachers)]
    command += ["--teacher_cache_dir", str(tmp_path / "cache")]
    output = ["--dataset_dir", str(tmp_path / "prepared")]
    main([*command, *output])
    assert "4 rows, 0 skipped, 9 encoded" in capsys.readouterr().out
    main([*command, "--streaming", "True"])
    assert "4 rows, 0 skipped, 0 encoded" in capsys.readouterr().out
    (tmp_path / "1.png").write_bytes(b"broken")
    main([*command, "--on_bad_row", "skip"])
    assert (
        "4 rows, 1 skipped, 0 encoded" in capsys.readouterr().out and "row 1 (rows.json:2), images[0]" in caplog.text
    )
    with pytest.raises(ValueError, match="leave `streaming` off"):
        main([*command, *output, "--streaming", "True"])
    for streaming in (False, True):
        prepared = load_data(str(tmp_path / "prepared" / "train"), streaming=streaming)
        assert teachers_of(prepared)["fingerprint"] == encoder.fingerprint
        found = [torch.tensor(np.array(sample["teacher_embeddings"], np.float32)) for sample in prepared]
        for n, values in enumerate(found):
            torch.testing.assert_close(
                values, encoder.encode([picture(n), "what is it?", f"star {n}"]), atol=5e-4, rtol=0
            )
