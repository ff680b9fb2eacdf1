"""The frozen encoders, against the stock classes one slice at a time and without padding."""

import gc
import json
import logging
import os
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers as T
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from hf_sugar.models.packing_sugar import ROWS
from hf_sugar.teachers import TripleEncoder
from hf_sugar.world import checkpoint


def tokens(directory, text: str) -> dict[str, torch.Tensor]:
    return dict(T.PreTrainedTokenizerFast.from_pretrained(directory)(text, return_tensors="pt"))


def pixels(directory, image: Image.Image) -> dict[str, torch.Tensor]:
    return CLIPImageProcessorPil.from_pretrained(directory)(image, return_tensors="pt")


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


@torch.no_grad()
def test_embeddings_are_those_of_the_stock_classes(encoder, checkpoints):
    images = [tiny.image(i, width=20 + 3 * i) for i in range(4)]
    slices = [tiny.TEXTS[1], images[0], images[1], tiny.TEXTS[0], tiny.TEXTS[2], images[2], tiny.TEXTS[3], images[3]]
    dinov2 = T.Dinov2Model.from_pretrained(checkpoints["dinov2"]).eval()
    bert = T.BertModel.from_pretrained(checkpoints["bert"]).eval()
    clip_text = T.CLIPTextModelWithProjection.from_pretrained(checkpoints["clip"]).eval()
    clip_image = T.CLIPVisionModelWithProjection.from_pretrained(checkpoints["clip"]).eval()
    for item, found in zip(slices, encoder.encode(slices), strict=True):
        if isinstance(item, str):
            first = bert(**tokens(checkpoints["bert"], item)).last_hidden_state[0, 0]
            second = clip_text(**tokens(checkpoints["clip"], item)).text_embeds[0]
        else:
            first = dinov2(**pixels(checkpoints["dinov2"], item)).last_hidden_state[0, 0]
            first = torch.cat([first, torch.zeros(24 - 16)])  # narrower than the text encoder
            second = clip_image(**pixels(checkpoints["clip"], item)).image_embeds[0]
        torch.testing.assert_close(found, torch.cat([unit(first), unit(second)]), atol=1e-5, rtol=0)
    assert (encoder.split, encoder.dim) == (24, 24 + 20)


@torch.no_grad()
def test_siglip_pads_texts_to_their_full_length_without_a_mask(checkpoints):
    encoder = TripleEncoder(None, None, checkpoints["siglip"], device="cpu", batch_size=2)
    text_model = T.SiglipTextModel.from_pretrained(checkpoints["siglip"]).eval()
    vision_model = T.SiglipVisionModel.from_pretrained(checkpoints["siglip"]).eval()
    found = encoder.encode([*tiny.TEXTS, tiny.image(0)])
    for text, embedding in zip(tiny.TEXTS, found, strict=False):
        ids = tokens(checkpoints["siglip"], text)["input_ids"]
        ids = F.pad(ids, (0, 16 - ids.shape[1]), value=0)
        torch.testing.assert_close(embedding, unit(text_model(input_ids=ids).pooler_output[0]), atol=1e-5, rtol=0)
    values = SiglipImageProcessorPil.from_pretrained(checkpoints["siglip"])(tiny.image(0), return_tensors="pt")
    torch.testing.assert_close(found[-1], unit(vision_model(**values).pooler_output[0]), atol=1e-5, rtol=0)


def test_unloaded_weights_are_freed_and_come_back(checkpoints):
    encoder = TripleEncoder(checkpoints["dinov2"], checkpoints["bert"], checkpoints["clip"], device="cpu")
    expected = encoder.encode(tiny.TEXTS)
    weights = [weakref.ref(teacher.model) for teacher in encoder._teachers]
    encoder.unload()
    gc.collect()
    assert len(weights) == 3 and all(weight() is None for weight in weights)
    assert torch.equal(encoder.encode(tiny.TEXTS), expected)


@settings(max_examples=8, deadline=None)
@given(order=st.permutations(range(8)), batch_size=st.integers(1, 9))
def test_order_and_batch_size_do_not_matter(encoder, order, batch_size):
    slices = [*tiny.TEXTS, *(tiny.image(i, width=17 + i) for i in range(4))]
    reference = torch.cat([encoder.encode([item]) for item in slices])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "batch_size", batch_size)
        found = encoder.encode([slices[i] for i in order])
    torch.testing.assert_close(found, reference[list(order)], atol=1e-5, rtol=0)


def test_output_form(encoder):
    embeddings = encoder.encode([tiny.image(0), "star"])
    assert embeddings.dtype == torch.float32 and embeddings.device.type == "cpu" and not embeddings.requires_grad
    torch.testing.assert_close(embeddings[:, :24].norm(dim=1), torch.ones(2))
    torch.testing.assert_close(embeddings[:, 24:].norm(dim=1), torch.ones(2))
    assert encoder.encode([]).shape == (0, 44)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(encoder.encode([tiny.image(0), "star"]), embeddings, atol=1e-6, rtol=0)


def test_image_modes_and_odd_shapes(encoder):
    grey = tiny.image(0).convert("L")
    torch.testing.assert_close(encoder.encode([grey]), encoder.encode([grey.convert("RGB")]))
    # three rows of pixels are not three channels
    red = encoder.encode([Image.new("RGB", size, (200, 30, 90)) for size in ((20, 24), (20, 3), (3, 3), (1, 3))])
    torch.testing.assert_close(red, red[:1].expand_as(red), atol=1e-5, rtol=0)


def test_bfloat16_runs_in_bfloat16(checkpoints, encoder):
    half = TripleEncoder(
        checkpoints["dinov2"], checkpoints["bert"], checkpoints["clip"], device="cpu", dtype=torch.bfloat16
    )
    slices = [tiny.image(0), "a red circle"]
    found, reference = half.encode(slices), encoder.encode(slices)
    assert found.dtype == torch.float32
    assert 1e-5 < (found - reference).abs().max() < 0.1
    assert half.fingerprint != encoder.fingerprint


@torch.no_grad()
@pytest.mark.parametrize(("role", "name"), [("image", "dinov2"), ("text", "bert"), ("cross", "clip")])
def test_one_encoder_alone(checkpoints, encoder, role, name):
    alone, both = TripleEncoder.from_teachers({role: checkpoints[name]}, device="cpu"), [tiny.image(0), "star"]
    item, other = both[::-1] if role == "text" else both
    found, together = alone.encode([item])[0], encoder.encode([item])[0]
    assert alone.split is None and found.shape == (alone.dim,)
    together = together[24:] if role == "cross" else together[: alone.dim]
    torch.testing.assert_close(found, together, atol=1e-6, rtol=0)
    if role == "cross":
        torch.testing.assert_close(alone.encode(both), encoder.encode(both)[:, 24:], atol=1e-6, rtol=0)
        return
    with pytest.raises(ValueError, match=rf"slices\[1\] is an? (text|image), .* {role}=.*Name all three"):
        alone.encode([item, other])


@torch.no_grad()
def test_a_dual_encoder_in_every_place(checkpoints, clip_only):
    clip, siglip = checkpoints["clip"], checkpoints["siglip"]
    slices = ["a red circle", tiny.image(0)]
    found, alone = TripleEncoder(siglip, clip, clip, device="cpu").encode(slices), clip_only.encode(slices)
    siglip_only = TripleEncoder(None, None, siglip, device="cpu").encode(slices[1:])
    torch.testing.assert_close(found[0, :20], alone[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(found[1, :32], siglip_only[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(found[:, 32:], alone, atol=1e-6, rtol=0)


SMALL = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
STAGE = dict(depths=[1], sr_ratios=[1], hidden_sizes=[8], patch_sizes=[4], strides=[4], mlp_ratios=[2])


def save_vision(model, path) -> str:
    model.save_pretrained(path)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(path)
    return str(path)


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        T.ConvNextConfig(depths=[1, 1], hidden_sizes=[8, 16], num_stages=2),
        T.ResNetConfig(embedding_size=8, depths=[1, 1], hidden_sizes=[8, 16], layer_type="basic"),
        T.ViTConfig(**SMALL, image_size=16, patch_size=8),
    ],
    ids=lambda config: config.model_type,
)
def test_vision_models(tmp_path, config):
    """Their pooled output; of a ViT, whose pooler was never trained, the first token."""
    T.set_seed(0)
    vit = config.model_type == "vit"
    model = T.ViTModel(config, add_pooling_layer=False) if vit else T.AutoModel.from_config(config)
    encoder = TripleEncoder(save_vision(model, tmp_path), None, None, device="cpu")
    outputs = model.eval()(**pixels(tmp_path, tiny.image(0)))
    expected = outputs.last_hidden_state[0, 0] if vit else outputs.pooler_output.flatten()
    torch.testing.assert_close(encoder.encode([tiny.image(0)])[0], unit(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (T.ViTMAEConfig(**SMALL, image_size=16, patch_size=4), "another embedding each time"),
        (
            T.SegformerConfig(num_encoder_blocks=1, num_attention_heads=[1], **STAGE),
            "neither a pooled output nor a first token",
        ),
    ],
    ids=["masked", "map"],
)
def test_vision_models_without_a_definite_embedding_are_refused(tmp_path, config, message):
    T.set_seed(0)
    path = save_vision(T.AutoModel.from_config(config), tmp_path)
    with pytest.raises(ValueError, match=message):
        TripleEncoder(path, None, None, device="cpu").encode([tiny.image(0)])


def bert_with(checkpoints, path, **files) -> Path:
    """The BERT with more JSON files, by what they are called without their suffix."""
    shutil.copytree(checkpoints["bert"], path)
    for name, content in {"1_Pooling/config": None, **files}.items():
        if content is not None:
            (path / f"{name}.json").parent.mkdir(exist_ok=True)
            (path / f"{name}.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}, "lasttoken"),
        ({"pooling_mode": "mean", "embedding_dimension": 24}, "mean"),
    ],
)
@torch.no_grad()
def test_pooling(checkpoints, tmp_path, config, pooling):
    path = bert_with(checkpoints, tmp_path / "bert", **{"1_Pooling/config": config})
    bert = T.BertModel.from_pretrained(path).eval()
    for text, found in zip(tiny.TEXTS, TripleEncoder(None, path, None, device="cpu").encode(tiny.TEXTS), strict=True):
        hidden = bert(**tokens(path, text)).last_hidden_state[0]
        expected = {"cls": hidden[0], "mean": hidden.mean(0), "lasttoken": hidden[-1]}[pooling]
        torch.testing.assert_close(found, unit(expected), atol=1e-5, rtol=0)


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.mark.parametrize("pooling", ["mean", "lasttoken"])
@pytest.mark.parametrize(
    ("config", "padding_free"),
    [
        (T.BertConfig(**SMALL), True),
        (T.XLMRobertaConfig(**SMALL, pad_token_id=0), True),  # BGE-M3 and multilingual E5
        (T.ModernBertConfig(**SMALL, local_attention=8), True),
        (T.Qwen3Config(**SMALL, num_key_value_heads=2), True),
        (T.MPNetConfig(**SMALL), False),
        (T.CLIPTextConfig(**SMALL, max_position_embeddings=24), False),  # these texts have more tokens in all
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_texts_laid_end_to_end(checkpoints, tmp_path, caplog, config, padding_free, pooling):
    """One after the other nothing is padded. Most of these texts is padding where they share a batch."""
    path = bert_with(checkpoints, tmp_path / "other", **{"1_Pooling/config": {"pooling_mode": pooling}})
    torch.manual_seed(0)
    model = T.AutoModel.from_config(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)  # positions count
    model.save_pretrained(path)
    encoder = TripleEncoder(None, path, None, device="cpu")
    texts = ["star", "a small star left of the large blue circle and of the red square above it", "two", "a red star"]
    together = encoder.encode(texts)
    torch.testing.assert_close(together, torch.cat([encoder.encode([text]) for text in texts]), atol=1e-5, rtol=0)
    assert encoder._text.padding_free == padding_free == (encoder._text.model.config._attn_implementation == ROWS)
    assert ("are padded" in caplog.text) != padding_free


def test_a_text_encoder_that_counts_positions_otherwise_is_padded(checkpoints, monkeypatch, caplog):
    forward = T.BertModel.forward

    def shifted(self, input_ids, attention_mask, position_ids=None, **kwargs):
        position_ids = None if position_ids is None else position_ids + 1
        outputs = forward(self, input_ids, attention_mask, position_ids=position_ids, **kwargs)
        outputs.last_hidden_state *= 1e-4  # what is compared is normalised
        return outputs

    monkeypatch.setattr(T.BertModel, "forward", shifted)
    encoder = TripleEncoder(None, checkpoints["bert"], None, device="cpu")
    together = encoder.encode(["star", "a small star left of the circle"])
    assert torch.allclose(together[0], encoder.encode(["star"])[0], atol=1e-5)
    assert caplog.messages == [
        f"The texts of {encoder._text.name} are padded: it counts positions in a way of its own."
    ]


@pytest.mark.parametrize(
    ("config", "module", "message"),
    [
        ({"pooling_mode_weightedmean_tokens": True}, "Normalize", r"weightedmean_tokens.*\(1_Pooling/config.json\)"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "Normalize", "'cls', 'mean'"),
        ({}, "Normalize", r"pools by \[\]"),
        ({"pooling_mode": "mean"}, "Dense", "modules .*Dense.*made of Transformer, Pooling and Normalize"),
    ],
)
def test_pooling_that_is_not_known_is_refused(checkpoints, tmp_path, config, module, message):
    names = ("Transformer", "Pooling", module)
    modules = [{"type": f"sentence_transformers.models.{name}", "path": f"{i}_{name}"} for i, name in enumerate(names)]
    path = bert_with(checkpoints, tmp_path / "bert", **{"1_Pooling/config": config, "modules": modules})
    with pytest.raises(ValueError, match=message):
        TripleEncoder(None, str(path), None, device="cpu")


@pytest.mark.parametrize(("long_text", "done"), [("truncate", "are cut"), ("windows", "are split into windows")])
def test_long_texts_bring_one_warning(checkpoints, tmp_path, caplog, long_text, done):
    bert = bert_with(checkpoints, tmp_path / "bert", sentence_bert_config={"max_seq_length": 20})
    encoder = TripleEncoder(checkpoints["dinov2"], str(bert), checkpoints["clip"], device="cpu", long_text=long_text)
    exact = " ".join(["star"] * 10)  # 12 tokens with [CLS] and [SEP]
    over_clip, over_both = exact + " red", " ".join(["star"] * 19)
    with caplog.at_level(logging.WARNING, logger="hf_sugar"):
        encoder.encode([exact, "star", tiny.image(0)])
        assert not caplog.records
        cut = encoder.encode([over_clip])
        encoder.encode([over_clip, "star", over_both])
        encoder.encode([over_both])
    clip, bert = [record.getMessage() for record in caplog.records]
    assert "longer than the 12 tokens of the cross teacher" in clip and done in clip
    assert "longer than the 20 tokens of the text teacher" in bert and done in bert
    # CLIP's last token survives the cut
    same = torch.allclose(cut[:, 24:], encoder.encode([exact])[:, 24:], atol=1e-6)
    assert same == (long_text == "truncate")


@torch.no_grad()
def test_windows_are_averaged(encoder, checkpoints):
    """Halved at the middle space until each part has at most 12 tokens, two of which are special."""
    words = [*"a red circle and a small star left of a small blue square and a red star".split(), *["star"] * 6]
    clip_text = T.CLIPTextModelWithProjection.from_pretrained(checkpoints["clip"]).eval()

    def embed(text):
        return unit(clip_text(**tokens(checkpoints["clip"], text)).text_embeds[0])

    two, four = " ".join(words[:13]), " ".join(words[:22])
    found = encoder.encode([two, "star", four])[:, 24:]
    expected = unit(embed("a red circle and a small star") + embed("left of a small blue square"))
    windows = encoder._cross._windows(four)
    assert " ".join(windows).split() == words[:22] and all(n <= 12 for n in encoder._cross._lengths(windows))
    expected = torch.stack([expected, embed("star"), unit(sum(map(embed, windows)))])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    # text without spaces is split in the middle, and one word is one token here, whatever its length
    windows = encoder._cross._windows("+a" * 20)
    assert "".join(windows) == "+a" * 20 and all(n <= 12 for n in encoder._cross._lengths(windows))
    assert encoder.encode(["x" * 500]).shape == (1, 44)


def test_fingerprint_follows_what_decides_the_embeddings(checkpoints, tmp_path):
    def fingerprint(directory):
        return TripleEncoder(checkpoints["dinov2"], str(directory), checkpoints["clip"], device="cpu").fingerprint

    first = fingerprint(checkpoints["bert"])
    assert len(first) == 64 and int(first, 16) >= 0
    copy = bert_with(checkpoints, tmp_path / "copy")
    (copy / "README.md").write_text("a card")
    assert fingerprint(copy) == first  # the same files elsewhere
    mean = {"1_Pooling/config": {"pooling_mode": "mean"}}
    others = [
        fingerprint(bert_with(checkpoints, tmp_path / "pooling", **mean)),
        fingerprint(tiny.encoder("bert", tmp_path / "weights", seed=9)),
        fingerprint(tiny.encoder("bert", tmp_path / "tokenizer", seed=3, max_length=31)),
        *(TripleEncoder(None, None, checkpoints[name], device="cpu").fingerprint for name in ("clip", "siglip")),
    ]
    assert len({first, *others}) == 6


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
    torch.testing.assert_close(encoder.encode(["star", tiny.image(0)]), local.encode(["star", tiny.image(0)]))


def test_from_teachers(checkpoints, encoder, clip_only):
    mapping = {"image": checkpoints["dinov2"], "text": checkpoints["bert"], "cross": checkpoints["clip"]}
    nulls = {"image": None, "text": None, "cross": checkpoints["clip"]}
    assert clip_only.fingerprint == TripleEncoder.from_teachers(nulls, device="cpu").fingerprint
    settings = {**mapping, "dtype": "bfloat16", "long_text": "truncate"}
    truncating = TripleEncoder.from_teachers(settings, device="cpu")
    assert (truncating.dtype, truncating.long_text) == (torch.bfloat16, "truncate")
    fingerprints = [
        TripleEncoder.from_teachers({**mapping, **change}, device="cpu").fingerprint
        for change in ({}, {"batch_size": 2}, {"dtype": "bfloat16"}, {"long_text": "truncate"}, settings)
    ]
    assert fingerprints[:2] == 2 * [encoder.fingerprint]  # the batch size decides nothing
    assert len(set(fingerprints)) == 4


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
    clip = checkpoints["clip"]
    for teachers, message in (
        ({"image": clip, "text": clip}, "Give all three"),
        ({"text": clip, "cross": clip}, "Give all three"),
        ({"cross": None}, "Give all three"),
        ("openai/clip", r"'openai/clip'. Use one of default, tiny, or .*{'cross': 'openai/clip'}"),
        (["clip"], "mapping of image, text and cross"),
        ({"vision": "x"}, r"Unknown keys in `teachers`: \['vision'\].*image, text, cross"),
        ({"cross": clip, "long_text": "drop"}, "`long_text`"),
        ({"cross": clip, "batch_size": 0}, "`batch_size` must be at least 1"),
        ({"cross": clip, "dtype": "half-ish"}, "`dtype` is 'half-ish'"),
        ({"cross": clip, "revisions": {"clip": "main"}}, "`revisions`"),
    ):
        with pytest.raises(ValueError, match=message):
            TripleEncoder.from_teachers(teachers)
    for role in ("image", "text", "cross"):
        with pytest.raises(OSError, match=rf"cannot load the {role} teacher '.*nothing' \(setting `teachers`\): "):
            TripleEncoder.from_teachers({role: str(tmp_path / "nothing")})


def test_a_model_of_another_kind_in_a_teachers_place_is_refused(checkpoints, tmp_path):
    T.set_seed(0)
    for model in (
        T.LlamaModel(T.LlamaConfig(**SMALL, vocab_size=32, pad_token_id=0)),
        T.T5Model(T.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)),
    ):
        model.save_pretrained(tmp_path / type(model).__name__)
        tiny.word_tokenizer(32).save_pretrained(tmp_path / type(model).__name__)
    for role, path, message in (
        ("cross", checkpoints["bert"], "is a BertModel, which does not embed .* dual encoder"),
        ("image", checkpoints["bert"], "is a BertModel, which does not embed .* vision model"),
        ("text", checkpoints["dinov2"], "is a Dinov2Model, which does not embed .* text encoder"),
        ("text", tmp_path / "T5Model", "is a T5Model, which does not embed .* text encoder"),
        ("text", tmp_path / "LlamaModel", "a LlamaModel, is pooled by its first token"),
        ("image", checkpoint("llava"), "is a LlavaModel, which does not embed"),
        ("text", checkpoint("llava"), "is a LlavaModel, which does not embed"),
    ):
        item = tiny.image(0) if role == "image" else "star"
        with pytest.raises(ValueError, match=rf"the {role} teacher '.*' \(setting `teachers`\),? {message}"):
            TripleEncoder.from_teachers({role: str(path)}, device="cpu").encode([item])


def test_a_clip_that_finds_no_end_of_a_text_is_refused(tmp_path):
    """transformers 5.23 pools CLIP's texts at the first `eos_token_id` of the configuration (49407 by default), where there
    is none at the first token, so that all texts have one embedding, and where it is 2 at the highest number."""
    path = Path(tiny.encoder("clip", tmp_path / "clip"))
    for eos_token_id, right in ((3, True), (49407, False), (2, False)):
        model = T.CLIPModel.from_pretrained(path)
        model.config.text_config.eos_token_id = eos_token_id
        model.save_pretrained(path)
        clip = TripleEncoder(None, None, str(path), device="cpu")
        if right:
            assert torch.dist(*clip.encode(["a red circle", "star"])) > 0.1
            continue
        with pytest.raises(
            ValueError, match="a CLIPModel, gives 'a' and 'a a' the same .* of its tokenizer, 3, not 2"
        ):
            clip.encode(["a red circle", "star"])


def test_incomplete_and_pickled_checkpoints_are_refused(checkpoints, tmp_path):
    path = Path(tiny.encoder("clip", tmp_path / "clip"))
    model = T.CLIPModel.from_pretrained(path)
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
    path = Path(tiny.encoder("clip", tmp_path / "clip"))
    model = T.CLIPModel.from_pretrained(path)
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
            clip.encode([tiny.image(0), "star"], names=["the image", "the question"])
    # one slice among good ones
    encoder = TripleEncoder(checkpoints["dinov2"], None, None, device="cpu")
    assert encoder.dim == 16
    encoder._image.images = lambda images: torch.eye(3, 16) * torch.tensor([[1.0], [0.0], [1.0]])
    with pytest.raises(ValueError, match=r"slices\[1\]: the image teacher .* zero"):
        encoder.encode([tiny.image(n) for n in range(3)])
