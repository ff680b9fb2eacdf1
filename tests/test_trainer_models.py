"""How models come into the trainer, and leave it."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tiny_runs import config, conversation, rows, story, trainer
from transformers import LlavaForConditionalGeneration
from trl import SFTConfig

from hf_sugar import SugarForConditionalGeneration, SugarTrainer


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
        run = trainer(backbone, config(path, teachers), lora=True)
        run.train()
        run.save_model()
        return str(path), outputs(run.model, run.processing_class)

    @pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2)], ids=["goes on", "merged first"])
    @pytest.mark.parametrize("given", ["path", "model", "peft"])
    def test_adapter_is_trained_on(self, backbone, make, first, tmp_path, given, peft_config, caplog):
        path, expected = first
        if given == "path":
            model = path
        elif given == "model":
            model = SugarForConditionalGeneration.from_pretrained(path)
        else:
            model = SugarForConditionalGeneration.from_pretrained(backbone, retrieval_dim=16)
            model = PeftModel.from_pretrained(model, f"{path}/adapter", is_trainable=True)
        if given == "peft" and peft_config is not None:
            with pytest.raises(ValueError, match="merge_and_unload"):
                make(model=model, peft_config=peft_config)
            return
        with caplog.at_level("INFO"):
            trainer = make(model=model, max_steps=2, peft_config=peft_config)
        assert ("is merged into it" in caplog.text) == (peft_config is not None)
        found = outputs(trainer.model, trainer.processing_class)
        torch.testing.assert_close(found.embeddings, expected.embeddings, atol=1e-6, rtol=0)
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=0)
        trainer.train()
        trainer.save_model()
        found = outputs(trainer.model, trainer.processing_class)
        assert (found.embeddings - expected.embeddings).abs().max() > 1e-3
        loaded = outputs(SugarForConditionalGeneration.from_pretrained(tmp_path / "run"), trainer.processing_class)
        torch.testing.assert_close(loaded.embeddings, found.embeddings, atol=1e-6, rtol=0)
        torch.testing.assert_close(loaded.logits, found.logits, atol=1e-5, rtol=0)

    @pytest.mark.parametrize(
        "given, error",
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
    def test_models_that_cannot_be_trained(self, backbone, teachers, tmp_path, given, error):
        model = given(SugarForConditionalGeneration.from_pretrained(backbone))
        with pytest.raises((TypeError, ValueError), match=error):
            trainer(model, config(tmp_path, teachers))

    @pytest.mark.parametrize(
        "name, given, error",
        [
            ("processing_class", tiny.tokenizer, "Pass the processor of the model"),
            ("args", lambda: SFTConfig("unused", bf16=False, use_cpu=True), "SFTConfig. Pass a `SugarTrainingConfig`"),
            *((name, lambda: tiny.llava, name) for name in ("model_init", "data_collator", "compute_loss_func")),
            ("formatting_func", lambda: str, "formatting_func"),
            ("peft_config", lambda: PromptTuningConfig(num_virtual_tokens=1, task_type="CAUSAL_LM"), "LoraConfig"),
            ("peft_config", lambda: LoraConfig(bias="all"), "bias"),
        ],
    )
    def test_arguments_of_another_kind(self, backbone, teachers, tmp_path, name, given, error):
        kwargs = {"args": config(tmp_path, teachers), "train_dataset": rows([conversation]), name: given()}
        with pytest.raises((TypeError, ValueError), match=error):
            SugarTrainer(backbone, **kwargs)

    def test_refusals_leave_the_adapter(self, make, first):
        model = SugarForConditionalGeneration.from_pretrained(first[0])
        with pytest.raises(ValueError, match="bias"):
            make(model=model, peft_config=LoraConfig(bias="all"))
        assert model.active_adapters() == ["default"]
        model.disable_adapters()
        with pytest.raises(ValueError, match="enable_adapters"):
            make(model=model)

    def test_stages_in_one_directory(self, backbone, teachers, tmp_path, monkeypatch):
        """Merged twice, named by a relative path: what is there is never lost."""
        monkeypatch.chdir(tmp_path)
        model = backbone
        for stage in ("out", "out", "other"):
            run = trainer(model, config(stage, teachers, max_steps=2), lora=True)
            run.train()
            run.save_model()
            model = stage
            with monkeypatch.context() as elsewhere:
                elsewhere.chdir("/")
                loaded = SugarForConditionalGeneration.from_pretrained(tmp_path / stage)
            found, expected = (outputs(each, run.processing_class) for each in (loaded, run.model))
            torch.testing.assert_close(found.embeddings, expected.embeddings, atol=1e-6, rtol=0)
            if stage == "out" and Path("out/backbone").exists():
                with pytest.raises(ValueError, match="Choose another directory"):
                    trainer("out", config("out", teachers), lora=True)

    def test_backbone_trained_before(self, make, backbone, tmp_path):
        """The adapter of weights that are no longer those of their place names the place where they are saved."""
        plain = LlavaForConditionalGeneration.from_pretrained(backbone)
        for lora in (False, True):
            settings = {"learning_rate": 0.1, "max_steps": 2, "processing_class": tiny.processor()}
            trainer = make(model=plain, lora=lora, **settings)
            trainer.train()
        trainer.save_model()
        loaded = SugarForConditionalGeneration.from_pretrained(tmp_path / "run")
        found, expected = (outputs(each, trainer.processing_class) for each in (loaded, trainer.model))
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("lora", [False, True])
    def test_projector_is_random_until_it_is_trained(self, make, backbone, lora):
        model = SugarForConditionalGeneration.from_pretrained(backbone, retrieval_dim=16)
        make(model=model, structure_weight=0.0, max_steps=1).train()
        trainer = make(model=model, lora=lora, max_steps=1)
        assert model.config.random_projector
        trainer.train()
        assert not model.config.random_projector and not trainer.model.config.random_projector

    def test_adapter_of_a_half_precision_backbone_stays_exact(self, make, tmp_path):
        trainer = make(lora=True, model_init_kwargs={"dtype": "bfloat16"}, max_steps=2)
        trainer.train()
        trainer.save_model()
        loaded = SugarForConditionalGeneration.from_pretrained(tmp_path / "run", dtype="bfloat16")
        trained = dict(trainer.model.get_base_model().named_parameters())
        pairs = [(weight, trained[name]) for name, weight in loaded.named_parameters() if "lora_" in name]
        assert pairs and all(
            weight.equal(other.to(weight.dtype)) and weight.dtype == torch.float32 for weight, other in pairs
        )

    def test_text_model_and_processors(self, make, tmp_path, caplog):
        tiny.llava().model.language_model.save_pretrained(tmp_path / "llama")
        with pytest.raises(TypeError, match="is a llama, not an image-text-to-text model"):
            make(model=str(tmp_path / "llama"))
        processor = tiny.processor()
        processor.patch_size = None
        with pytest.raises(ValueError, match="no `patch_size`"):
            make(processing_class=processor)
        processor = tiny.processor()
        processor.tokenizer.pad_token = None
        with caplog.at_level("INFO"):
            trainer = make(processing_class=processor)
        assert "no padding token; '</s>' is used" in caplog.text
        assert trainer.processing_class.tokenizer.pad_token == "</s>" and processor.tokenizer.pad_token is None

    def test_the_callers_objects_stay_as_they_are(self, backbone, teachers, tmp_path):
        lora = LoraConfig(r=4)
        args = config(tmp_path, teachers, model_init_kwargs={"dtype": "bfloat16"})
        before = copy.deepcopy((lora.to_dict(), args.to_dict()))
        for _ in range(2):
            run = trainer(backbone, args, peft_config=lora)
            assert run.model.get_base_model().vlm.dtype == torch.bfloat16
            assert (lora.to_dict(), args.to_dict()) == before

    @pytest.mark.parametrize("lora", [False, True])
    def test_copy_computes_with_its_own_weights(self, make, lora):
        trainer = make(lora=lora, max_steps=1, bf16=True)
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

    def test_the_head_scores_tokens_with_a_label_alone(self, make):
        """Beside embeddings; TRL's own head gives the same values, among those of images, prompts and padding."""
        trainer = make((conversation, story))
        batch = trainer.data_collator([trainer.train_dataset[n] for n in range(3)])
        batch = {key: value for key, value in batch.items() if key not in ("teacher_embeddings", "slice_modality")}
        scored = trainer.model(**batch, fused_lm_head=True)
        every = trainer.model(**{**batch, "slice_ids": None, "singles": None}, fused_lm_head=True)
        assert every.log_probs.shape == batch["labels"][:, 1:].shape and scored.label_mask.all()
        for name in ("log_probs", "entropy", "is_top1"):
            assert torch.allclose(getattr(scored, name)[0], getattr(every, name)[every.label_mask], atol=1e-5)
        assert scored.loss.item() == pytest.approx(every.loss.item(), rel=1e-6)
        batch["labels"] = torch.full_like(batch["labels"], -100)
        nothing = trainer.model(**batch, fused_lm_head=True)
        (nothing.loss + nothing.embeddings.sum()).backward()
        assert nothing.loss.item() == 0

    @pytest.mark.parametrize("lora", [False, True])
    def test_second_trainer_has_its_own_precision(self, make, backbone, lora):
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
            trainer = make(model=model, eval_dataset=rows([story], 4), max_steps=1, bf16=bf16)
            for run in (trainer.evaluate, trainer.train):
                run()
                assert seen == {
                    "backbone": torch.bfloat16 if bf16 else torch.float32,
                    "projector": torch.float32,  # whatever the precision of the run
                }
