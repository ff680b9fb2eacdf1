"""Rows laid end to end against the same rows padded."""

import pytest
import tiny
import tiny_backbones
import torch
from test_backbones import CONVERSATIONS
from tiny_runs import caption, conversation, history, rows, story
from transformers import MistralConfig
from trl.trainer.utils import add_fused_lm_head

from hf_sugar import SugarEmbedder, SugarForConditionalGeneration, SugarProcessor
from hf_sugar.models.packing_sugar import lay_rows, why_padded
from hf_sugar.training.heads import add_structure_head
from hf_sugar.training.sampler import TokenBatches, row_lengths


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
    return padded, model.embed_slices(**inputs)[0], lay_rows(model.vlm, dict(inputs))[1] is not None


@pytest.mark.parametrize("family", tiny_backbones.EVERY_FAMILY)
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

    sizes = [(40, 40), (30, 80), (60, 28), (100, 200)]
    counts = processor.count_tokens(["", "", "", "star"], [[size] for size in sizes])
    tokens = [len(processor.embed_inputs([tiny.image(0, *size)])["input_ids"][0]) for size in sizes]
    if family != "aya_vision":  # transformers 5.24 leaves the names of its tiles out
        [template] = {tokens - count for tokens, count in zip(tokens[:3], counts)}
        star = processor.tokenizer("star", add_special_tokens=False)["input_ids"]
        assert counts[3] - tokens[3] + template == len(star)


def test_a_family_whose_rows_are_padded_is_named(monkeypatch):
    model, processor = built("gemma3")
    said = []
    monkeypatch.setattr("hf_sugar.models.packing_sugar.logger.warning_once", said.append)
    embed = SugarEmbedder(model, processor)
    embed(["star", "a red circle and a small star left of it"])
    [line] = said
    assert line.startswith("The rows of gemma3 are padded: its masks are its own")
    model.padding_free = False
    embed(["star", "a red circle and a small star left of it"])
    assert said == [line]


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
    assert free.log_probs.shape == padded.log_probs.shape == (1, (batch["labels"][:, 1:] != -100).sum())
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
    assert lay_rows(model.vlm, dict(processor.embed_inputs(["star"] * 3)))[1] is None
    model.vlm.set_attn_implementation("eager")
    assert "eager" in why_padded(model.vlm)
    padded, free, laid = in_both_ways(model, processor.encode_conversations(CONVERSATIONS))
    assert torch.equal(padded, free) and not laid


class TestTraining:
    @pytest.mark.parametrize("extra", [{}, {"matrix_batch_size": 8, "structure_weight": 1.0}])
    def test_a_run_is_that_of_padded_rows(self, make, extra):
        logs = []
        for padding_free in (False, True):
            settings = {"padding_free": padding_free, "max_steps": 2, "eval_strategy": "steps"} | extra
            trainer = make((conversation, caption, story), eval_dataset=rows([caption, story], 6), **settings)
            trainer.train()
            logs.append(trainer.state.log_history)
            assert trainer.args.padding_free == padding_free
            assert (trainer.model.vlm.get_decoder().config._attn_implementation == "sdpa_rows") == padding_free
        kinds = ("loss", "grad_norm", "num_tokens", "mean_token_accuracy")
        names = [name for name in logs[0][1] | logs[0][0] if name.removeprefix("eval_") in kinds or "_loss" in name]
        assert len(names) >= 8 and len(logs[0]) == len(logs[1])
        for padded, free in zip(*logs):
            found, expected = ({name: log[name] for name in names if name in log} for log in (free, padded))
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)

    def test_families_that_cannot_are_named(self, make, caplog):
        model, processor = tiny_backbones.build("gemma3")
        settings = dict(model=model, processing_class=processor, structure_weight=0.0, padding_free=True)
        make(**settings)
        assert "the rows of gemma3 are padded: its masks are its own" in caplog.text
        with pytest.raises(ValueError, match="max_batch_tokens.*gemma3"):
            make(**settings, max_batch_tokens=200)


class TestTokenBatches:
    def batches(self, lengths, budget, epoch=0, world_size=2):
        samplers = [TokenBatches(lengths, torch.tensor(epoch), budget, 3, r, world_size) for r in range(world_size)]
        assert len({len(sampler) for sampler in samplers}) == 1
        return [list(sampler) for sampler in samplers]

    def test_every_row_once_and_no_process_waits(self):
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(40, 1500, (400,), generator=generator).tolist()
        first, second = self.batches(lengths, 6000), self.batches(lengths, 6000, epoch=1)
        assert first == self.batches(lengths, 6000) != second
        assert len(first[0]) == len(first[1]) == len(second[0])
        for ranks in (first, second):
            assert sorted(row for rank in ranks for batch in rank for row in batch) == list(range(400))
            totals = [[sum(lengths[row] for row in batch) for batch in rank] for rank in ranks]
            assert max(map(max, totals)) <= 6000 and min(map(min, totals)) > 5000
        # rows meet others in the next epoch
        together = {frozenset(batch) for rank in first for batch in rank}
        assert not together & {frozenset(batch) for rank in second for batch in rank}

    def test_what_does_not_fit(self):
        assert sorted(map(len, sum(self.batches([60] * 8, 100, world_size=1), []))) == [1] * 8
        with pytest.raises(ValueError, match=r"max_batch_tokens.*100.*train_dataset\[1\] alone has 101"):
            self.batches([5, 101], 100)
        with pytest.raises(ValueError, match="1 rows are too few for 2 processes"):
            self.batches([5], 100)

    def test_a_run_and_its_resumption(self, make, tmp_path):
        settings = dict(padding_free=True, max_batch_tokens=150, num_train_epochs=2, max_steps=-1)
        settings |= dict(save_strategy="steps", save_steps=1, structure_weight=0.0)
        whole, resumed = (make(rows([conversation, caption, story], 16), **settings) for _ in range(2))
        lengths = row_lengths(whole.train_dataset, whole.processing_class)
        for length, row in zip(lengths, whole.train_dataset):
            inputs = whole.data_collator([row])["attention_mask"]
            assert 0 < inputs.sum() - length <= 12  # the chat template
        whole.train()
        steps = whole.state.max_steps
        assert steps % 2 == 0 and history(whole, "epoch")[-2] == 2
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{steps // 2 + 1}"))
        assert history(resumed, "loss") == history(whole, "loss")

    def test_settings_that_cannot_work(self, make):
        for settings in ({}, {"padding_free": True, "matrix_batch_size": 8}):
            with pytest.raises(ValueError, match="max_batch_tokens.*padding_free.*matrix_batch_size"):
                make(max_batch_tokens=100, **settings)
        with pytest.raises(ValueError, match="max_batch_tokens.*streaming"):
            make(rows([conversation]).to_iterable_dataset(), max_batch_tokens=100, padding_free=True)


def test_the_embedder_cuts_batches_by_tokens(monkeypatch):
    model, processor = built("llava_next")
    sizes = [(40, 40), (30, 80), (40, 40), (60, 28), (30, 80), (40, 40)]
    items = [tiny.image(n, *size) for n, size in enumerate(sizes)]
    shapes, compute = [], model.embed_slices
    monkeypatch.setattr(model, "embed_slices", lambda **kw: shapes.append(kw["input_ids"].shape) or compute(**kw))
    embeddings = SugarEmbedder(model, processor, batch_size=3)(items)
    assert [tuple(shape) for shape in shapes] == [(3, 28), (3, 20)]  # 24, 14 and 16 tokens, and the template's
    shapes.clear()
    cut = SugarEmbedder(model, processor, batch_size=3, max_batch_tokens=56)(items)
    assert [tuple(shape) for shape in shapes] == [(2, 28), (2, 28), (2, 18)]
    monkeypatch.setattr(model.config, "document_instruction", "a b c d")
    told = SugarEmbedder(model, processor, batch_size=3, max_batch_tokens=56)
    told(items[:3] + [{"messages": [{"role": r, "content": "a"} for r in ("user", "assistant")]}] * 3, "document")
    assert all(shape.numel() <= 56 or len(shape) == 1 for shape in shapes[3:])
    torch.testing.assert_close(torch.from_numpy(cut), torch.from_numpy(embeddings), atol=1e-5, rtol=0)
