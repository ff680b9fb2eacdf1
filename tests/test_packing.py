"""Rows laid end to end against the same rows padded."""

import pytest
import test_trainer
import tiny
import tiny_backbones
import torch
from test_backbones import CONVERSATIONS
from transformers import MistralConfig
from trl.trainer.utils import add_fused_lm_head

from hf_sugar import SugarForConditionalGeneration, SugarProcessor, SugarTrainer
from hf_sugar.models.packing_sugar import lay_rows, why_padded
from hf_sugar.training.heads import add_structure_head


def built(family: str):
    raw, processor = tiny_backbones.build(family)
    model = SugarForConditionalGeneration.from_vlm(raw, retrieval_dim=16)
    return model, SugarProcessor.from_processor(processor)


@torch.no_grad()
def in_both_ways(model, inputs):
    """Embeddings of padded rows and of rows end to end, and whether the latter were."""
    model.padding_free = False
    padded, _ = model.embed_slices(**inputs)
    model.padding_free = True
    return padded, model.embed_slices(**inputs)[0], lay_rows(model, dict(inputs))[1] is not None


@pytest.mark.parametrize("family", tiny_backbones.FAMILIES)
def test_embeddings_are_those_of_padded_rows(family):
    model, processor = built(family)
    for side in ("right", "left"):
        inputs = processor.encode_conversations(CONVERSATIONS, padding_side=side)
        padded, free, laid = in_both_ways(model, inputs)
        torch.testing.assert_close(free, padded, atol=1e-5, rtol=0)
        assert laid == (family != "gemma3") == (why_padded(model.vlm) is None)
    inputs = processor.embed_inputs(["a red circle and a small star left of it", "star"])
    padded, free, _ = in_both_ways(model, inputs)
    torch.testing.assert_close(free, padded, atol=1e-5, rtol=0)


def test_a_sliding_window_stays_within_its_row():
    config = tiny.llava().config
    text = tiny_backbones.text("mistral", sliding_window=6)
    config.text_config = MistralConfig(**{key: value for key, value in text.items() if key != "model_type"})
    model = SugarForConditionalGeneration.from_vlm(type(tiny.llava())(config).eval(), retrieval_dim=16)
    inputs = SugarProcessor.from_processor(tiny.processor()).encode_conversations(CONVERSATIONS)
    padded, free, laid = in_both_ways(model, inputs)
    torch.testing.assert_close(free, padded, atol=1e-5, rtol=0)
    config.text_config.sliding_window = 2000
    assert laid and (in_both_ways(model, inputs)[1] - free).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients_are_those_of_padded_rows(family, checkpointing):
    model, processor = built(family)
    add_fused_lm_head(model)
    add_structure_head(model, padding_free=False)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = dict(processor.encode_conversations(CONVERSATIONS, ["text", None, *["text"] * 3]))
    batch["labels"][:, 0] = 5  # is never asked for, at the start of another row least of all
    batch["singles"] = dict(processor.embed_inputs(["star", "a red circle and a small star left of it"]))
    found = []
    for padding_free in (False, True):
        model.padding_free = padding_free
        model.train().zero_grad()
        output = model(**batch, fused_lm_head=True)
        weights = torch.linspace(-1, 1, output.embeddings.numel()).view_as(output.embeddings)
        (output.loss + (output.embeddings * weights).sum() + output.single_embeddings[:, 0].sum()).backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((output, gradients))
    (padded, expected), (free, gradients) = found
    assert free.log_probs.shape == (1, batch["attention_mask"].sum() - 1)
    assert free.label_mask.sum() == padded.label_mask.sum()
    assert gradients.keys() == expected.keys() and any("vis" in name for name in gradients)
    for name in ("loss", "embeddings", "embedding_mask", "single_embeddings"):
        torch.testing.assert_close(getattr(free, name), getattr(padded, name), atol=1e-5, rtol=0)
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], atol=1e-5, rtol=1e-5)


def test_logits_and_answers_stay_those_of_the_backbone():
    model, processor = built("llava")
    inputs = processor.encode_conversations(CONVERSATIONS, padding_side="left")
    assert in_both_ways(model, inputs)[2]
    plain = {key: value for key, value in inputs.items() if key != "slice_ids"}
    raw = tiny_backbones.build("llava")[0]
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, raw(**plain).logits)
    expected = raw.generate(**plain, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), expected)


def test_rows_of_one_length_and_other_attention_stay_padded():
    model, processor = built("llava")
    assert lay_rows(model, dict(processor.embed_inputs(["star"] * 3)))[1] is None
    model.vlm.set_attn_implementation("eager")
    assert "eager" in why_padded(model.vlm)
    padded, free, laid = in_both_ways(model, processor.encode_conversations(CONVERSATIONS))
    assert torch.equal(padded, free) and not laid
