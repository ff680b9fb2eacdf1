import copy
import json
import math
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from accelerate.utils import gather_object
from datasets import Dataset, Features, Image, List, Value
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import EarlyStoppingCallback, LlavaForConditionalGeneration
from trl import SFTConfig, SFTTrainer

from hf_sugar import SugarForConditionalGeneration, SugarProcessor, SugarTrainer, SugarTrainingConfig
from hf_sugar.alignment import IMAGE, TEXT, label_matrix
from hf_sugar.cli.train import EstimatedTrainingConfig
from hf_sugar.teachers import TripleEncoder, add_teacher_embeddings
from hf_sugar.training import SugarCollator


FEATURES = Features(
    {
        "messages": [{"role": Value("string"), "content": [{"type": Value("string"), "text": Value("string")}]}],
        "images": List(Image()),
        "loss_on": Value("string"),
        "id": Value("string"),
    }
)
COMMON = dict(
    per_device_train_batch_size=4,
    per_device_eval_batch_size=4,
    bf16=False,
    use_cpu=True,
    gradient_checkpointing=False,
    report_to=[],
    save_strategy="no",
    logging_steps=1,
    disable_tqdm=True,
    seed=7,
    max_steps=4,
    learning_rate=1e-2,
)


# the paper's loss and labels, and this library's first way of training captions alone
PAPER = dict(discriminative_loss="structure", label_calibration="none", flip_captions=True)


def image_part():
    return {"type": "image", "text": None}


def text_part(text):
    return {"type": "text", "text": text}


def conversation(i):
    user = {"role": "user", "content": [image_part(), text_part(f"what is this {i % 3}?")]}
    return [user, {"role": "assistant", "content": [text_part(f"a red circle {i}")]}]


def caption(i):
    return [{"role": "user", "content": [image_part(), text_part(f"a blue square {i}")]}]


def story(i):
    parts = [p for k in range(2 + i % 2) for p in (text_part(f"step {k} of {i}"), image_part())]
    return [{"role": "user", "content": parts}]


def rows(makers, n=12):
    data = []
    for i in range(n):
        make = makers[i % len(makers)]
        messages = make(i)
        count = sum(part["type"] == "image" for message in messages for part in message["content"])
        loss_on = {"conversation": "answers", "caption": "captions", "story": "text"}[make.__name__]
        images = [tiny.image(10 * i + k) for k in range(count)]
        data.append({"messages": messages, "images": images, "loss_on": loss_on, "id": f"row-{i}"})
    return Dataset.from_list(data, features=FEATURES)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    path = tmp_path_factory.mktemp("llava")
    tiny.llava().save_pretrained(path)
    tiny.processor().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    path = tmp_path_factory.mktemp("teachers")
    return tiny.teachers(path)


def config(path, teachers=None, **kwargs):
    return SugarTrainingConfig(output_dir=str(path), **{**COMMON, "retrieval_dim": 16, "teachers": teachers, **kwargs})


def history(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


class TestSftEquality:
    @pytest.mark.parametrize("lora", [False, True])
    @pytest.mark.parametrize("accumulation", [1, 2])
    def test_weight_zero_is_sft_to_the_last_bit(self, backbone, tmp_path, lora, accumulation):
        """TRL's own trainer on the plain LLaVA class, with the same rows, seed, chat template and masking."""
        data = rows([conversation])
        kwargs = {**COMMON, "gradient_accumulation_steps": accumulation, "lr_scheduler_type": "cosine"}
        peft = {"target_modules": r".*language_model.*q_proj", "r": 4}
        ours = SugarTrainer(
            backbone,
            SugarTrainingConfig(str(tmp_path / "a"), structure_weight=0.0, warmup_steps=0.03, **kwargs),
            train_dataset=data,
            peft_config=LoraConfig(**peft) if lora else None,
        )
        ours.train()
        theirs = SFTTrainer(
            backbone,
            SFTConfig(str(tmp_path / "b"), max_length=None, assistant_only_loss=True, warmup_steps=0.03, **kwargs),
            train_dataset=data,
            processing_class=SugarProcessor.from_pretrained(backbone),
            peft_config=LoraConfig(**peft) if lora else None,
        )
        theirs.train()
        assert history(ours, "loss") == history(theirs, "loss")
        assert history(ours, "grad_norm") == history(theirs, "grad_norm")
        assert len(history(ours, "loss")) == 4


class TestStructureLoss:
    def test_trains_and_logs_both_losses(self, backbone, teachers, tmp_path):
        trainer = SugarTrainer(
            backbone,
            config(tmp_path, teachers, max_steps=3, eval_strategy="steps", eval_steps=3),
            train_dataset=rows([conversation, caption, story]),
            eval_dataset=rows([caption], 6),
            peft_config=LoraConfig(r=4),
        )
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        assert any("retrieval_projector" in name for name in before)
        assert not any("vision_tower" in name or "multi_modal_projector" in name for name in before)
        trainer.train()
        for name, parameter in trainer.model.named_parameters():
            if name in before:
                assert not torch.equal(parameter, before[name]), f"{name} was not trained"
        names = ("generative_loss", "structure_loss", "contrastive_loss", "loss")
        for g, d, c, total in zip(*(history(trainer, k) for k in names)):
            assert total == pytest.approx(g + 0.02 * (d + 20 * c), rel=1e-3)
        evaluation = next(e for e in trainer.state.log_history if "eval_loss" in e)
        assert evaluation["eval_structure_loss"] > 0
        assert any("eval_image_to_text_recall@1" in e for e in trainer.state.log_history)

    def test_loss_is_the_label_matrix_against_the_cosines(self, backbone, teachers, tmp_path):
        """The logged value, computed again from the model's and the teachers' embeddings of every prefix."""
        data = rows([conversation, story], 4)
        trainer = SugarTrainer(
            backbone,
            config(tmp_path, teachers, **PAPER, positions_per_sample=99, max_steps=1, learning_rate=0.0),
            train_dataset=data,
        )
        trainer.train()
        [logged] = history(trainer, "structure_loss")

        model, processor = trainer.model.eval(), trainer.processing_class
        documents = []
        for row in data:
            images = iter(row["images"])
            parts = [part for message in row["messages"] for part in message["content"]]
            documents.append([next(images) if part["type"] == "image" else part["text"] for part in parts])
        assert all(
            "model" not in vars(teacher) for teacher in trainer._encoder._teachers
        )  # their memory is the training's
        embeddings, prefixes = [], []
        for d, (row, document) in enumerate(zip(data, documents)):
            filled = [{"role": m["role"], "content": [dict(part) for part in m["content"]]} for m in row["messages"]]
            images = iter(row["images"])
            for message in filled:
                for part in message["content"]:
                    if part["type"] == "image":
                        part["image"] = next(images)
            with torch.no_grad():
                embeddings.append(model(**processor.encode_conversations([filled])).embeddings[0])
            prefixes += [(d, n + 1) for n in range(len(document))]
        items = [item for document in documents for item in document]
        labels, _ = label_matrix(
            trainer._encoder.encode(items),
            torch.tensor([0, *torch.tensor([len(document) for document in documents]).cumsum(0)]),
            torch.tensor(prefixes),
            modality=torch.tensor([TEXT if isinstance(item, str) else IMAGE for item in items]),
            split=trainer._split,
        )
        vectors = torch.cat(embeddings).double()
        expected = ((vectors @ vectors.T - labels.double()) ** 2).sum() / len(vectors)
        assert logged == pytest.approx(expected.item(), rel=1e-4)

    @pytest.mark.parametrize(
        "kwargs",
        [
            {"gradient_checkpointing": True},
            {"bf16": True},
            {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
            {"label_kernel": "mean"},
            {"image_pooling": "last", "label_normalization": "none", "structure_reduction": "mean"},
        ],
        ids=str,
    )
    def test_settings(self, backbone, teachers, tmp_path, kwargs):
        trainer = SugarTrainer(
            backbone,
            config(tmp_path, teachers, max_steps=2, **kwargs),
            train_dataset=rows([conversation, caption, story]),
            peft_config=LoraConfig(r=4),
        )
        before = trainer.model.get_base_model().retrieval_projector.modules_to_save["default"].linear_1.weight.clone()
        trainer.train()
        after = trainer.model.get_base_model().retrieval_projector.modules_to_save["default"].linear_1.weight
        assert not torch.equal(before, after)
        assert all(value > 0 for value in history(trainer, "structure_loss"))

    def test_checkpointing_and_accumulation_change_nothing(self, backbone, teachers, tmp_path):
        def losses(**kwargs):
            trainer = SugarTrainer(
                backbone,
                config(tmp_path, teachers, flip_captions=False, positions_per_sample=99, **kwargs),
                train_dataset=rows([conversation, story]),
            )
            trainer.train()
            return history(trainer, "generative_loss"), history(trainer, "structure_loss")

        plain, checkpointed = losses(), losses(gradient_checkpointing=True)
        for a, b in zip(plain, checkpointed):
            assert a == pytest.approx(b, rel=1e-4)
        # with no learning, the generative loss of a batch is that of its halves accumulated
        whole = losses(learning_rate=0.0, max_steps=2)[0]
        halves = losses(learning_rate=0.0, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2)[
            0
        ]
        assert whole == pytest.approx(halves, rel=1e-4)

    def test_streaming_with_online_teachers(self, backbone, teachers, tmp_path):
        stream = rows([conversation, caption]).to_iterable_dataset()
        trainer = SugarTrainer(
            backbone, config(tmp_path, teachers, teacher_mode="online", max_steps=2), train_dataset=stream
        )
        trainer.train()
        assert len(history(trainer, "structure_loss")) == 2
        with pytest.raises(ValueError, match="streaming.*teacher_mode='online'"):
            SugarTrainer(backbone, config(tmp_path, teachers), train_dataset=stream)

    def test_rows_of_similar_length_share_a_batch_when_asked(self, backbone, teachers, tmp_path):
        data = rows([conversation, story], 160)
        trainer = SugarTrainer(
            backbone,
            config(tmp_path, teachers, train_sampling_strategy="group_by_length"),
            train_dataset=data,
            eval_dataset=data.select(range(6)),
        )
        batches = [batch["slice_modality"] for batch in trainer.get_train_dataloader()]
        # conversations have three slices, stories four or more
        mixed = sum((batch[:, 3:] >= 0).any(1).unique().numel() > 1 for batch in batches)
        assert len(batches) == 40 and mixed <= 10
        assert len(list(trainer.get_eval_dataloader())) >= 1

    def test_clip_alone(self, backbone, teachers, tmp_path):
        trainer = SugarTrainer(
            backbone, config(tmp_path, {"cross": teachers["cross"]}, max_steps=1), train_dataset=rows([story])
        )
        trainer.train()
        assert history(trainer, "structure_loss")[0] > 0


def outputs(model, processor):
    with torch.no_grad():
        return model.eval()(**processor.embed_inputs(["a red circle", tiny.image()]))


ALL_TRAINED = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["retrieval_projector"])


def _with_plain_adapter(sugar):
    get_peft_model(sugar.vlm, LoraConfig(target_modules=["q_proj"]))
    sugar.vlm.config.name_or_path = sugar.config.name_or_path  # of its processor
    return sugar.vlm


def _changed(sugar):
    with torch.no_grad():
        sugar.get_input_embeddings().weight += 1
    return sugar


class TestModels:
    """Every way a model comes in. What is saved loads in one line and computes the same."""

    @pytest.fixture(scope="class")
    @staticmethod
    def first(backbone, teachers, tmp_path_factory):
        """An adapter repository, and what its model computes."""
        path = tmp_path_factory.mktemp("first")
        trainer = SugarTrainer(
            backbone, config(path, teachers), train_dataset=rows([conversation]), peft_config=LoraConfig(r=4)
        )
        trainer.train()
        trainer.save_model()
        return str(path), outputs(trainer.model, trainer.processing_class)

    @pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2)], ids=["goes on", "merged first"])
    @pytest.mark.parametrize("given", ["path", "model", "peft"])
    def test_adapter_is_trained_on(self, backbone, teachers, first, tmp_path, given, peft_config, caplog):
        path, expected = first
        if given == "path":
            model = path
        elif given == "model":
            model = SugarForConditionalGeneration.from_pretrained(path)
        else:
            model = SugarForConditionalGeneration.from_pretrained(backbone, retrieval_dim=16)
            model = PeftModel.from_pretrained(model, f"{path}/adapter", is_trainable=True)
        args = config(tmp_path, teachers, max_steps=2)
        with caplog.at_level("INFO"):
            if given == "peft" and peft_config is not None:
                with pytest.raises(ValueError, match="merge_and_unload"):
                    SugarTrainer(model, args, train_dataset=rows([conversation]), peft_config=peft_config)
                return
            trainer = SugarTrainer(model, args, train_dataset=rows([conversation]), peft_config=peft_config)
        assert ("is merged into it" in caplog.text) == (peft_config is not None)
        found = outputs(trainer.model, trainer.processing_class)
        torch.testing.assert_close(found.embeddings, expected.embeddings, atol=1e-6, rtol=0)
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=0)
        trainer.train()
        trainer.save_model()
        found = outputs(trainer.model, trainer.processing_class)
        assert (found.embeddings - expected.embeddings).abs().max() > 1e-3
        loaded = outputs(SugarForConditionalGeneration.from_pretrained(tmp_path), trainer.processing_class)
        torch.testing.assert_close(loaded.embeddings, found.embeddings, atol=1e-6, rtol=0)
        torch.testing.assert_close(loaded.logits, found.logits, atol=1e-5, rtol=0)

    @pytest.mark.parametrize(
        "make, error",
        [
            (lambda sugar: get_peft_model(sugar, LoraConfig(target_modules=["q_proj"])), "modules_to_save"),
            (lambda sugar: get_peft_model(sugar.vlm, LoraConfig(target_modules=["q_proj"])), "no retrieval projector"),
            (lambda sugar: sugar.requires_grad_(False), "requires_grad"),
            (lambda sugar: sugar.vlm.model, "LlavaModel, not an image-text-to-text model"),
            (lambda sugar: None, "NoneType, not an image-text-to-text model"),
            (_with_plain_adapter, "adapter of its own"),
            (lambda sugar: get_peft_model(_changed(sugar), ALL_TRAINED), "lie nowhere"),
            (lambda sugar: get_peft_model(sugar, replace(ALL_TRAINED, init_lora_weights="pissa")), "lie nowhere"),
        ],
        ids=["projector left out", "plain", "frozen", "no head", "none", "adapter within", "changed", "pissa"],
    )
    def test_models_that_cannot_be_trained(self, backbone, teachers, tmp_path, make, error):
        model = make(SugarForConditionalGeneration.from_pretrained(backbone))
        with pytest.raises((TypeError, ValueError), match=error):
            SugarTrainer(model, config(tmp_path, teachers), train_dataset=rows([conversation]))

    @pytest.mark.parametrize(
        "name, make, error",
        [
            ("processing_class", tiny.tokenizer, "reads no images"),
            ("args", lambda: SFTConfig("unused", bf16=False, use_cpu=True), "SFTConfig. Pass a `SugarTrainingConfig`"),
            *((name, lambda: tiny.llava, name) for name in ("model_init", "data_collator", "compute_loss_func")),
            ("formatting_func", lambda: str, "formatting_func"),
            ("peft_config", lambda: PromptTuningConfig(num_virtual_tokens=1, task_type="CAUSAL_LM"), "LoraConfig"),
            ("peft_config", lambda: LoraConfig(bias="all"), "bias"),
        ],
    )
    def test_arguments_of_another_kind(self, backbone, teachers, tmp_path, name, make, error):
        kwargs = {"args": config(tmp_path, teachers), "train_dataset": rows([conversation]), name: make()}
        with pytest.raises((TypeError, ValueError), match=error):
            SugarTrainer(backbone, **kwargs)

    def test_adapter_switched_off(self, backbone, teachers, first, tmp_path):
        model = SugarForConditionalGeneration.from_pretrained(first[0])
        model.disable_adapters()
        with pytest.raises(ValueError, match="enable_adapters"):
            SugarTrainer(model, config(tmp_path, teachers), train_dataset=rows([conversation]))

    def test_refusal_leaves_the_adapter(self, first, teachers, tmp_path):
        model = SugarForConditionalGeneration.from_pretrained(first[0])
        with pytest.raises(ValueError, match="bias"):
            SugarTrainer(
                model,
                config(tmp_path, teachers),
                train_dataset=rows([conversation]),
                peft_config=LoraConfig(bias="all"),
            )
        assert model.active_adapters() == ["default"]

    def test_stages_in_one_directory(self, backbone, teachers, tmp_path, monkeypatch):
        """Merged twice, named by a relative path: what is there is never lost."""
        monkeypatch.chdir(tmp_path)
        model = backbone
        for stage in ("out", "out", "other"):
            trainer = SugarTrainer(
                model, config(stage, teachers), train_dataset=rows([conversation]), peft_config=LoraConfig(r=4)
            )
            trainer.train()
            trainer.save_model()
            model = stage
            with monkeypatch.context() as elsewhere:
                elsewhere.chdir("/")
                loaded = SugarForConditionalGeneration.from_pretrained(tmp_path / stage)
            found = outputs(trainer.model, trainer.processing_class)
            torch.testing.assert_close(
                outputs(loaded, trainer.processing_class).embeddings, found.embeddings, atol=1e-6, rtol=0
            )
            if stage == "out" and Path("out/backbone").exists():
                with pytest.raises(ValueError, match="Choose another directory"):
                    SugarTrainer(
                        "out", config("out", teachers), train_dataset=rows([conversation]), peft_config=LoraConfig()
                    )

    def test_backbone_trained_before(self, backbone, teachers, tmp_path):
        """The adapter of weights that are no longer those of their place names the place where they are saved."""
        plain = LlavaForConditionalGeneration.from_pretrained(backbone)
        for peft_config in (None, LoraConfig(r=4)):
            trainer = SugarTrainer(
                plain,
                config(tmp_path, teachers, learning_rate=0.1),
                train_dataset=rows([conversation]),
                processing_class=tiny.processor(),
                peft_config=peft_config,
            )
            trainer.train()
        trainer.save_model()
        loaded = SugarForConditionalGeneration.from_pretrained(tmp_path)
        found = outputs(trainer.model, trainer.processing_class)
        torch.testing.assert_close(outputs(loaded, trainer.processing_class).logits, found.logits, atol=1e-5, rtol=0)

    def test_adapter_of_a_half_precision_backbone_stays_exact(self, backbone, teachers, tmp_path):
        trainer = SugarTrainer(
            backbone,
            config(tmp_path, teachers, model_init_kwargs={"dtype": "bfloat16"}),
            train_dataset=rows([conversation]),
            peft_config=LoraConfig(r=4),
        )
        trainer.train()
        trainer.save_model()
        loaded = SugarForConditionalGeneration.from_pretrained(tmp_path, dtype="bfloat16")
        trained = dict(trainer.model.get_base_model().named_parameters())
        pairs = [(weight, trained[name]) for name, weight in loaded.named_parameters() if "lora_" in name]
        assert pairs and all(
            weight.equal(other.to(weight.dtype)) and weight.dtype == torch.float32 for weight, other in pairs
        )

    def test_text_model_and_processors(self, backbone, teachers, tmp_path, caplog):
        tiny.llava().model.language_model.save_pretrained(tmp_path / "llama")
        with pytest.raises(TypeError, match="is a llama, not an image-text-to-text model"):
            SugarTrainer(str(tmp_path / "llama"), config(tmp_path, teachers), train_dataset=rows([conversation]))
        processor = tiny.processor()
        processor.patch_size = None
        with pytest.raises(ValueError, match="no `patch_size`"):
            SugarTrainer(
                backbone,
                config(tmp_path, teachers),
                train_dataset=rows([conversation]),
                processing_class=processor,
            )
        processor = tiny.processor()
        processor.tokenizer.pad_token = None
        with caplog.at_level("INFO"):
            trainer = SugarTrainer(
                backbone,
                config(tmp_path, teachers),
                train_dataset=rows([conversation]),
                processing_class=processor,
            )
        assert "no padding token; '</s>' is used" in caplog.text
        assert trainer.processing_class.tokenizer.pad_token == "</s>" and processor.tokenizer.pad_token is None

    def test_the_callers_objects_stay_as_they_are(self, backbone, teachers, tmp_path):
        lora = LoraConfig(r=4)
        args = config(tmp_path, teachers, model_init_kwargs={"dtype": "bfloat16"})
        before = copy.deepcopy((lora.to_dict(), args.to_dict()))
        for _ in range(2):
            trainer = SugarTrainer(backbone, args, train_dataset=rows([conversation]), peft_config=lora)
            assert trainer.model.get_base_model().vlm.dtype == torch.bfloat16
            assert (lora.to_dict(), args.to_dict()) == before

    @pytest.mark.parametrize("lora", [False, True])
    def test_copy_computes_with_its_own_weights(self, backbone, teachers, tmp_path, lora):
        trainer = SugarTrainer(
            backbone,
            config(tmp_path, teachers, max_steps=1, bf16=True),
            train_dataset=rows([conversation]),
            peft_config=LoraConfig(r=4) if lora else None,
        )
        trainer.train()
        model = trainer.model.eval()
        inputs = trainer.processing_class.embed_inputs(["a red circle", tiny.image()])
        twin = copy.deepcopy(model)
        assert torch.equal(twin(**inputs).logits, model(**inputs).logits)
        for parameter in twin.parameters():
            torch.nn.init.zeros_(parameter)
        output = twin(**inputs)
        assert not output.logits.any() and not output.embeddings.any() and not twin.embed(**inputs).any()
        assert not twin.generate(**inputs, max_new_tokens=1)[:, -1].any()
        batch = trainer.data_collator([trainer.train_dataset[0]])
        batch = {key: value for key, value in batch.items() if key not in ("teacher_embeddings", "slice_modality")}
        fused = twin(**batch, fused_lm_head=True)
        assert fused.loss.item() == pytest.approx(math.log(384), rel=1e-3)
        (fused.loss + output.logits.sum()).backward()
        assert all(parameter.grad is None for parameter in model.parameters())
        assert any(parameter.grad is not None for parameter in twin.parameters())

    @pytest.mark.parametrize("lora", [False, True])
    def test_second_trainer_has_its_own_precision(self, backbone, teachers, tmp_path, lora):
        seen = {}
        model = SugarForConditionalGeneration.from_pretrained(backbone, retrieval_dim=16)
        if lora:
            model = get_peft_model(
                model, LoraConfig(target_modules=["q_proj"], modules_to_save=["retrieval_projector"])
            )
        base = model.get_base_model() if lora else model

        def note(name):
            return lambda module, inputs, output: seen.__setitem__(name, output.dtype)

        base.vlm.model.language_model.layers[0].mlp.up_proj.register_forward_hook(note("backbone"))
        projector = base.retrieval_projector.modules_to_save["default"] if lora else base.retrieval_projector
        projector.linear_2.register_forward_hook(note("projector"))
        for bf16 in (False, True, False):
            trainer = SugarTrainer(
                model,
                config(tmp_path, teachers, max_steps=1, bf16=bf16),
                train_dataset=rows([conversation]),
                eval_dataset=rows([story], 4),
            )
            for run in (trainer.evaluate, trainer.train):
                run()
                assert seen == {
                    "backbone": torch.bfloat16 if bf16 else torch.float32,
                    "projector": torch.float32,  # whatever the precision of the run
                }


class TestRows:
    def collator(self, backbone, **kwargs):
        return SugarCollator(SugarProcessor.from_pretrained(backbone), **kwargs)

    def test_captions_appear_in_both_orders(self, backbone):
        torch.manual_seed(0)
        collator = self.collator(backbone, embed_slices=lambda slices: torch.ones(len(slices), 2), flip_captions=True)
        batch = collator([dict(row) for row in rows([caption], 40)])
        first = batch["slice_modality"][:, 0]
        assert 10 < (first == TEXT).sum() < 30
        learnt = (batch["labels"] != -100).any(1)
        assert torch.equal(learnt, first == IMAGE)
        batch = collator([dict(row) for row in rows([conversation], 8)])
        assert (batch["slice_modality"][:, 0] == IMAGE).all()

    def test_prompt_and_completion_rows_learn_the_completion(self, backbone):
        turns = conversation(0) + [
            {"role": "user", "content": [text_part("and where?")]},
            {"role": "assistant", "content": [text_part("left")]},
        ]
        row = {"prompt": turns[:3], "completion": turns[3:], "image": tiny.image()}
        collator = self.collator(backbone)
        [labels] = collator([row])["labels"]
        assert collator.processor.tokenizer.decode(labels[labels != -100]).strip() == "left</s>"
        # as TRL's own collator has it, token for token
        whole = collator([{"messages": turns, "images": [tiny.image()]}])
        assert torch.equal(whole["input_ids"], collator([row])["input_ids"])

    def test_text_only_rows_mix_with_images(self, backbone):
        text = {
            "messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}],
            "images": [],
        }
        batch = self.collator(backbone)([text, dict(rows([conversation], 1)[0])])
        assert len(batch["pixel_values"]) == 1
        assert "pixel_values" not in self.collator(backbone)([text])


class TestErrors:
    """Each names the row and the remedy, and comes before any training."""

    def test_bad_rows(self, backbone, teachers, tmp_path):
        data = rows([conversation], 6).to_list()
        data[3]["messages"].pop()
        data[4]["images"] = []
        with pytest.raises(ValueError, match=r"(?s)row 3 \(row-3\).*no answer.*row 4 \(row-4\).*0 images"):
            SugarTrainer(
                backbone, config(tmp_path, teachers), train_dataset=Dataset.from_list(data, features=FEATURES)
            )

    def test_unreadable_image_is_named_without_teachers_too(self, backbone, tmp_path):
        data = rows([conversation], 6).to_list()
        data[3]["images"] = [{"bytes": b"not an image", "path": None}]
        trainer = SugarTrainer(
            backbone,
            config(tmp_path, structure_weight=0.0),
            train_dataset=Dataset.from_list(data, features=FEATURES),
        )
        with pytest.raises(ValueError, match="(?s)Row row-3.*cannot be decoded"):
            trainer.train()

    def test_too_long(self, backbone, teachers, tmp_path):
        data = rows([conversation], 4).to_list()
        data[2]["messages"][1]["content"][0]["text"] = "long " * 600
        for kwargs in (PAPER, {}):  # found at the first batch, or when the labels are measured
            with pytest.raises(ValueError, match=r"Row row-2 has \d+ tokens after its 1 image\(s\).*limit is 512"):
                SugarTrainer(
                    backbone,
                    config(tmp_path, teachers, **kwargs),
                    train_dataset=Dataset.from_list(data, features=FEATURES),
                ).train()

    def test_cache_of_other_teachers(self, backbone, teachers, tmp_path):
        settings = {"teacher_cache_dir": str(tmp_path / "cache")}
        SugarTrainer(backbone, config(tmp_path, teachers, **settings), train_dataset=rows([conversation]))
        with pytest.raises(ValueError, match="(?s)other settings.*there: .*image=.*asked for: +cross="):
            SugarTrainer(
                backbone,
                config(tmp_path, {"cross": teachers["cross"]}, **settings),
                train_dataset=rows([conversation]),
            )

    def test_rows_that_carry_their_embeddings_need_no_teacher(self, backbone, teachers, tmp_path, monkeypatch):
        data = rows([conversation, caption])
        prepared = add_teacher_embeddings(data, TripleEncoder.from_teachers(teachers), tmp_path / "prepared")
        cross = {"cross": teachers["cross"]}
        with pytest.raises(ValueError, match="(?s)of other teachers.*there: +image=.*asked for: +cross="):
            SugarTrainer(backbone, config(tmp_path, cross), train_dataset=prepared)
        others = add_teacher_embeddings(data, TripleEncoder.from_teachers(cross), tmp_path / "others")
        with pytest.raises(ValueError, match="(?s)of other teachers.*there: +cross=.*asked for: +image="):
            SugarTrainer(backbone, config(tmp_path), train_dataset=prepared, eval_dataset=others)
        losses = {}
        for name, dataset, setting in (
            ("computed", data, teachers),
            ("carried", prepared, None),
            ("streamed", prepared.to_iterable_dataset(), None),
        ):
            if setting is None:
                monkeypatch.setattr("hf_sugar.teachers.checkpoint.AutoConfig", None)
            settings = {"max_steps": 2, "train_sampling_strategy": "sequential", "eval_strategy": "no"}
            trainer = SugarTrainer(backbone, config(tmp_path / name, setting, **settings), train_dataset=dataset)
            trainer.train()
            losses[name] = history(trainer, "structure_loss")
            assert set(trainer.teachers) == set(teachers) and math.isfinite(trainer.evaluate(dataset)["eval_loss"])
        assert losses["carried"] == losses["computed"]
        assert losses["streamed"] == pytest.approx(losses["computed"], rel=1e-5)

    @pytest.mark.parametrize(
        "name, value",
        [
            *(("structure_weight", value) for value in (-1.0, math.nan, math.inf, 1e200)),
            *(("delta", value) for value in (0.0, 1e200, math.nan)),
            *(
                (name, 0)
                for name in ("positions_per_sample", "retrieval_dim", "per_device_train_batch_size", "max_length")
            ),
            ("label_kernel", "dtw"),
            ("teacher_mode", "offline"),
            # what TRL would take and nothing here would heed
            *((name, True) for name in ("packing", "padding_free", "completion_only_loss", "assistant_only_loss")),
            ("completion_only_loss", False),
            ("label_smoothing_factor", 0.1),
        ],
    )
    def test_settings_that_cannot_be_meant(self, tmp_path, name, value):
        with pytest.raises(ValueError, match=f"`{name}`"):
            config(tmp_path, **{name: value})

    def test_dataset_with_transform(self, backbone, teachers, tmp_path):
        with pytest.raises(ValueError, match="with_transform.*`map`"):
            SugarTrainer(
                backbone,
                config(tmp_path, teachers),
                train_dataset=rows([conversation]).with_transform(lambda rows: rows),
            )


class TestDefaults:
    def test_machine_without_gpu(self, tmp_path, caplog, monkeypatch):
        """TRL's defaults are those of a GPU with bfloat16; what is asked for stays."""
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
        with caplog.at_level("INFO"), warnings.catch_warnings():
            warnings.simplefilter("error")
            args = SugarTrainingConfig(str(tmp_path))
        assert (args.use_cpu, args.bf16) == (True, False)
        assert args.gradient_checkpointing
        assert SugarTrainingConfig(str(tmp_path), bf16=True).bf16
        # the machine that asks what a run needs need not be the one that trains
        assert EstimatedTrainingConfig(str(tmp_path)).bf16
        assert not EstimatedTrainingConfig(str(tmp_path), bf16=False).bf16


class TestSaving:
    @pytest.mark.parametrize("lora", [False, True])
    def test_resume_goes_on_as_if_never_stopped(self, backbone, teachers, tmp_path, lora):
        def trainer(steps, **kwargs):
            return SugarTrainer(
                backbone,
                config(
                    tmp_path / "out",
                    teachers,
                    lr_scheduler_type="constant",
                    warmup_steps=0,
                    max_steps=steps,
                    save_strategy="steps",
                    save_steps=2,
                    **kwargs,
                ),
                train_dataset=rows([conversation, caption, story]),
                peft_config=LoraConfig(r=4) if lora else None,
            )

        whole = trainer(4)
        whole.train()
        resumed = trainer(4)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
        for key in ("generative_loss", "structure_loss"):
            assert history(resumed, key)[-2:] == pytest.approx(history(whole, key)[-2:], rel=1e-5)
        assert history(whole, "loss")[2] != pytest.approx(history(whole, "loss")[0], rel=1e-3)

    def test_full_checkpoint_can_be_trained_on(self, backbone, teachers, tmp_path):
        first = SugarTrainer(
            backbone, config(tmp_path / "a", teachers, max_steps=1), train_dataset=rows([conversation])
        )
        first.train()
        first.save_model()
        second = SugarTrainer(
            str(tmp_path / "a"),
            config(tmp_path / "b", teachers, max_steps=1, retrieval_dim=8),
            train_dataset=rows([conversation]),
        )
        # the projector is the one that was saved, whatever size a new one would have
        for name, value in first.model.retrieval_projector.state_dict().items():
            assert torch.equal(second.model.retrieval_projector.state_dict()[name], value)


def compared(path, backbone, teachers, batch):
    """Losses of the same rows in the same global batches, and the evaluation of an uneven number of rows."""
    settings = dict(positions_per_sample=99, flip_captions=False, train_sampling_strategy="sequential", max_steps=3)
    trainer = SugarTrainer(
        backbone,
        config(path, teachers, per_device_train_batch_size=batch, **settings),
        train_dataset=rows([conversation, story], 16),
        eval_dataset=rows([conversation, story, caption], 7),
    )
    trainer.args.per_device_train_batch_size = 4  # rows that are compared in an evaluation
    stream = SugarTrainer(
        backbone,
        config(path, structure_weight=0.0, per_device_train_batch_size=batch),
        train_dataset=rows([conversation], 16).to_iterable_dataset(num_shards=2),
    )
    read = gather_object([ids for batch in stream.get_train_dataloader() for ids in batch["input_ids"].tolist()])
    keys = ("loss", "generative_loss", "structure_loss", "image_to_text_recall@1")
    evaluated = trainer.evaluate()
    streamed = trainer.evaluate(trainer.eval_dataset.select(range(4)).with_format(None).to_iterable_dataset())
    trainer.train()
    found = {key: history(trainer, key) for key in ("loss", "generative_loss", "structure_loss", "grad_norm")}
    found |= {"rows read": len(read), "different": len({tuple(ids) for ids in read})}
    return found | {
        f"{n}_{key}": metrics[f"eval_{key}"] for n, metrics in enumerate((evaluated, streamed)) for key in keys
    }


def agree(path, backbone, teachers, lora, on_start):
    """Whether the processes end with the same weights when they have evaluated before they train."""
    data = rows([conversation, caption], 8)
    trainer = SugarTrainer(
        backbone,
        config(path, teachers, eval_strategy="steps", eval_steps=2, eval_on_start=on_start),
        train_dataset=data,
        eval_dataset=data,
        peft_config=LoraConfig(r=4) if lora else None,
    )
    if not on_start:
        trainer.evaluate()
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
    first, second = trainer.accelerator.gather(weights).chunk(2)
    return type(trainer.model_wrapped).__name__, torch.equal(first, second)


WORKER = """
import json, sys
sys.path.insert(0, sys.argv[1])
import test_trainer as t
t.torch.set_num_threads(1)
path, backbone, teachers = sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
found = [t.compared(path, backbone, teachers, 4)]
found += [t.agree(path, backbone, teachers, *how) for how in ((False, False), (True, False), (True, True))]
if t.torch.distributed.get_rank() == 0:
    print("RESULT", json.dumps(found))
"""


def test_two_processes(backbone, teachers, tmp_path):
    """As one process with the same global batch: the structure loss compares the positions of both processes with one
    another, a stream is divided between them, and evaluation counts every row once. Their weights stay equal, evaluated before or not: accelerate takes a
    model that was prepared for an evaluation as it is, without DDP."""
    (tmp_path / "worker.py").write_text(WORKER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = [str(Path(__file__).parent), str(tmp_path / "two"), backbone, json.dumps(teachers)]
    result = subprocess.run(
        [*launch, str(tmp_path / "worker.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, result.stderr[-3000:]
    two, *agreeing = json.loads(lines[0].removeprefix("RESULT"))
    for key, values in compared(tmp_path / "one", backbone, teachers, 8).items():
        assert two[key] == pytest.approx(values, abs=1e-5, rel=1e-5), key
    assert two["rows read"] == two["different"] == 16
    assert agreeing == 3 * [["DistributedDataParallel", True]]
    assert "FutureWarning" not in result.stderr


class TestEvaluation:
    def test_apart_from_the_training(self, backbone, teachers, tmp_path):
        """The same every time, whatever the batches, and the training does not notice."""
        losses = []
        for strategy in ("no", "steps"):
            trainer = SugarTrainer(
                backbone,
                config(tmp_path, teachers, positions_per_sample=1, eval_strategy=strategy, eval_steps=1),
                train_dataset=rows([caption, story]),
                eval_dataset={"a": rows([story], 6), "b": rows([caption], 5)},
            )
            trainer.train()
            losses.append(history(trainer, "loss"))
        assert losses[0] == losses[1]
        first = trainer.evaluate()
        trainer.args.per_device_eval_batch_size = 1
        second = trainer.evaluate()
        names = ("loss", "generative_loss", "structure_loss", "samples_compared")
        for name in [f"eval_{key}_{name}" for key in "ab" for name in names] + ["eval_b_image_to_text_recall@1"]:
            assert second[name] == pytest.approx(first[name], rel=1e-5), name
        predicted = trainer.predict(rows([caption], 5), metric_key_prefix="eval_b").metrics
        assert predicted["eval_b_loss"] == pytest.approx(first["eval_b_loss"], rel=1e-5)

    def test_loss_of_rows(self, backbone, teachers, tmp_path):
        """Against the mean over all tokens, and over groups of rows, computed by hand."""
        data = rows([conversation, story], 6)
        trainer = SugarTrainer(
            backbone,
            config(tmp_path, teachers, **PAPER, per_device_eval_batch_size=2, positions_per_sample=99, max_steps=1),
            train_dataset=data,
            eval_dataset=data,
        )
        found = trainer.evaluate()
        losses, model = [], trainer.model.eval()
        for group in (range(4), range(4, 6)):
            batch = trainer._eval_collator([trainer.eval_dataset[i] for i in group])
            teacher_embeddings, modality = batch.pop("teacher_embeddings"), batch.pop("slice_modality")
            with torch.no_grad():
                output = model(**batch)
            tokens = (batch["labels"][:, 1:] != -100).sum().item()
            present = modality >= 0
            counts = present.sum(1)
            labels, _ = label_matrix(
                teacher_embeddings[present],
                torch.tensor([0, *counts.cumsum(0)]),
                torch.tensor([(i, n + 1) for i, count in enumerate(counts) for n in range(count)]),
                modality=modality[present],
                split=trainer._split,
            )
            cosines = output.embeddings[present] @ output.embeddings[present].T
            structure = ((cosines - labels) ** 2).sum() / len(labels)
            losses.append((output.loss.item() * tokens, tokens, structure.item() * len(group), len(group)))
        generative, tokens, structure, count = map(sum, zip(*losses))
        assert found["eval_generative_loss"] == pytest.approx(generative / tokens, rel=1e-4)
        assert found["eval_structure_loss"] == pytest.approx(structure / count, rel=1e-4)
        assert found["eval_loss"] == pytest.approx(generative / tokens + 0.3 * structure / count, rel=1e-4)

    def test_early_stopping_on_recall(self, backbone, teachers, tmp_path):
        trainer = SugarTrainer(
            backbone,
            config(
                tmp_path,
                teachers,
                learning_rate=0.0,
                eval_strategy="steps",
                eval_steps=1,
                save_strategy="steps",
                save_steps=1,
                load_best_model_at_end=True,
                metric_for_best_model="image_to_text_recall@1",
            ),
            train_dataset=rows([caption]),
            eval_dataset=rows([caption], 6),
            callbacks=[EarlyStoppingCallback(1)],
        )
        trainer.train()
        assert trainer.state.global_step == 2 and trainer.state.best_global_step == 1


class TestBatches:
    def test_one_sample_is_nothing_to_compare(self, backbone, teachers, tmp_path, caplog):
        def trainer(n, **kwargs):
            return SugarTrainer(backbone, config(tmp_path, teachers, **kwargs), train_dataset=rows([story], n))

        with pytest.raises(ValueError, match="one sample.*per_device_train_batch_size.*allow_single_sample"):
            trainer(4, per_device_train_batch_size=1, gradient_accumulation_steps=8)
        allowed = trainer(4, per_device_train_batch_size=1, allow_single_sample=True, max_steps=1)
        assert "the embeddings collapse" in caplog.text
        allowed.train()
        assert history(allowed, "structure_loss")[0] > 0
        assert history(allowed, "samples_compared") == [1]
        # the last batch of an epoch may have one row
        uneven = trainer(5, max_steps=2)
        uneven.train()
        assert history(uneven, "samples_compared") == [4, 1]
        assert history(uneven, "structure_loss")[0] > 0 == history(uneven, "structure_loss")[1]

    def test_persistent_workers_know_the_epoch(self, backbone, teachers, tmp_path):
        first_slices = []

        class Noting(SugarTrainer):
            def training_step(self, model, inputs, *args, **kwargs):
                first_slices[-1].append(inputs["slice_modality"][:, 0].tolist())
                return super().training_step(model, inputs, *args, **kwargs)

        for kwargs in ({}, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}):
            first_slices.append([])
            Noting(
                backbone,
                config(tmp_path, teachers, **PAPER, max_steps=9, learning_rate=0.0, **kwargs),
                train_dataset=rows([caption]),
            ).train()
        assert first_slices[0] == first_slices[1]
        assert len({sum(map(sum, first_slices[0][n : n + 3])) for n in (0, 3, 6)}) > 1


class TestResume:
    def test_goes_back_to_a_whole_checkpoint(self, backbone, teachers, tmp_path, caplog):
        def trainer(directory):
            return SugarTrainer(
                backbone,
                config(directory, teachers, save_strategy="steps", save_steps=2),
                train_dataset=rows([conversation]),
                peft_config=LoraConfig(r=4),
            )

        trainer(tmp_path / "out").train()
        newest = tmp_path / "out" / "checkpoint-4"
        state = newest / "trainer_state.json"
        state.write_text(state.read_text()[:100])  # the last file that is written
        resumed = trainer(tmp_path / "out")
        with pytest.raises(
            ValueError, match="(?s)checkpoint-4 is no checkpoint that was written to its end.*checkpoint-2"
        ):
            resumed.train(resume_from_checkpoint=str(newest))
        resumed.train(resume_from_checkpoint=True)
        assert "checkpoint-4 was not written to its end" in caplog.text
        assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == [1, 2, 3, 4]
        with pytest.raises(ValueError, match="No checkpoint in .* was written to its end"):
            trainer(tmp_path / "empty").train(resume_from_checkpoint=True)
