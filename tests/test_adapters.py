"""Adapters on their way out and in again: switched, exported, merged, refused; and what tells backbones apart."""

from itertools import combinations

import pytest
import tiny
import torch
import transformers
from packaging import version
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from saved_checkpoints import CODE, TARGETS, changed, contents, embed, hub_repository, load, read, trained
from tiny_runs import conversation, rows
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    logging,
)

from hf_sugar import SugarForConditionalGeneration, SugarProcessor
from hf_sugar.models.fingerprint_sugar import fingerprint, same_fingerprint


FIRST, SECOND = "1" * 40, "2" * 40  # commits


class TestAdapter:
    @pytest.mark.parametrize("name", ["adapter", "llava"])
    def test_no_report_of_a_projector_that_is_new_or_comes_later(self, saved, capfd, name):
        logging.enable_propagation()
        try:
            model, info = AutoModel.from_pretrained(saved / "adapter", output_loading_info=True)
            load(saved / name)
        finally:
            logging.disable_propagation()
        assert not any(word in "".join(capfd.readouterr()) for word in ("MISSING", "retrieval_projector"))
        assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
        assert not info["unexpected_keys"] and not info["mismatched_keys"]

    def test_saved_again_it_is_an_adapter_again(self, saved, inputs, tmp_path):
        model = load(saved / "adapter")
        model.save_pretrained(tmp_path)
        assert contents(tmp_path) == contents(saved / "adapter") - contents(saved / "full") | {
            "config.json",
            *CODE - {"processing_sugar.py", "rows_sugar.py"},
        }
        assert read(tmp_path / "config.json") == read(saved / "adapter" / "config.json")
        again = load(tmp_path)
        assert torch.equal(embed(again, inputs), embed(model, inputs))

    def test_several_are_switched_with_their_projectors(self, saved, inputs, tmp_path):
        names = ("adapter", "other")
        alone = {n: embed(load(saved / n), inputs) for n in names}
        model = load(saved / "adapter")
        model.load_sugar_adapter(saved / "other", "other")
        assert torch.equal(embed(model, inputs), alone["other"])
        model.set_adapter("default")
        assert torch.equal(embed(model, inputs), alone["adapter"])
        model.disable_adapters()
        assert not torch.equal(embed(model, inputs), alone["adapter"])
        model.enable_adapters()
        assert torch.equal(embed(model, inputs), alone["adapter"])
        model.set_adapter("other")
        model.save_pretrained(tmp_path)
        assert torch.equal(embed(load(tmp_path), inputs), alone["other"])
        with pytest.raises(ValueError, match="the name 'other' is attached"):
            model.load_sugar_adapter(saved / "other", "other")
        for name in ("third", ["default", "other"]):
            with pytest.raises(ValueError, match="no adapter .*, only default, other"):
                model.set_adapter(name)
        assert not any(parameter.requires_grad for parameter in model.parameters())

    def test_a_trained_projector_comes_with_one(self, saved, tmp_path):
        model = load(saved / "llava", retrieval_dim=16)
        assert model.config.random_projector
        model.load_sugar_adapter(saved / "adapter")
        assert not model.config.random_projector
        model.save_pretrained(tmp_path)
        assert not read(tmp_path / "config.json")["random_projector"]

    def test_checkpoints_of_a_training(self, saved, plain, make, tmp_path):
        """Each is an adapter repository, and the best one is found again."""
        settings = dict(save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, max_steps=2)
        settings |= dict(structure_weight=0, load_best_model_at_end=True, metric_for_best_model="eval_loss")
        settings |= dict(learning_rate=0.1, greater_is_better=True)  # so the first is it
        data = rows([conversation], 4)
        trainer = make(data, str(saved / "llava"), lora=True, eval_dataset=data, **settings)
        trainer.train()
        first, second = (load(tmp_path / "run" / f"checkpoint-{step}") for step in (1, 2))
        assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
        with torch.no_grad():
            found, first, second = (model(**plain).logits for model in (trainer.model.eval(), first, second))
        assert torch.equal(found, first) and not torch.equal(first, second)
        assert AutoProcessor.from_pretrained(tmp_path / "run" / "checkpoint-1").chat_template

    def test_with_peft_itself(self, saved, inputs):
        model = load(saved / "llava", dtype=torch.float32, retrieval_dim=16)
        model = PeftModel.from_pretrained(model, saved / "adapter" / "adapter")
        assert torch.equal(embed(model, inputs), embed(trained(saved / "llava"), inputs))

    def test_exports_for_the_stock_class(self, saved, plain, tmp_path):
        """`test_whatever_peft_trains` compares what they compute."""
        model = load(saved / "adapter")
        processor = SugarProcessor.from_pretrained(saved / "adapter")
        model.export_adapter(tmp_path / "adapter")
        assert contents(tmp_path / "adapter") == {"adapter_config.json", "adapter_model.safetensors"}
        # transformers finds the backbone by itself, if it does not ask for a later PEFT
        if version.parse(transformers.__version__) < version.parse("5.24"):
            stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "adapter")
            with torch.no_grad():
                assert torch.equal(stock(**plain).logits, model(**plain).logits)
        with pytest.raises(ValueError, match="no adapter to export"):
            load(saved / "full").export_adapter(tmp_path)
        with pytest.raises(ValueError, match="`merge=True`"):
            model.export_backbone(tmp_path / "backbone")
        model.export_backbone(tmp_path / "backbone", merge=True, processor=processor)
        files = contents(tmp_path / "backbone")
        assert not files & CODE
        assert not any("auto_map" in (tmp_path / "backbone" / name).read_text() for name in files if "json" in name)
        found, expected = (load_file(path / "model.safetensors") for path in (tmp_path / "backbone", saved / "llava"))
        assert found.keys() == expected.keys()
        stock = AutoProcessor.from_pretrained(tmp_path / "backbone")
        assert type(stock) is LlavaProcessor and stock.chat_template == processor.chat_template
        assert isinstance(processor, SugarProcessor)

    def test_the_commit_of_the_backbone_is_pinned(self, saved, inputs, tmp_path):
        hub_repository(tmp_path / "hub", "me/llava", {SECOND: saved / "llava"})
        model = load("me/llava", cache_dir=tmp_path / "hub", retrieval_dim=16)
        model = get_peft_model(model, LoraConfig(**TARGETS, modules_to_save=["retrieval_projector"])).get_base_model()
        model.save_pretrained(tmp_path / "adapter")
        config = read(tmp_path / "adapter" / "config.json")
        assert (config["backbone_name_or_path"], config["backbone_revision"]) == ("me/llava", SECOND)
        adapter = read(tmp_path / "adapter" / "adapter" / "adapter_config.json")
        assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("me/llava", SECOND)
        (tmp_path / "hub" / "models--me--llava" / "refs" / "main").write_text(FIRST)  # something else since
        again = load(tmp_path / "adapter", cache_dir=tmp_path / "hub")
        assert torch.equal(embed(again, inputs), embed(model.eval(), inputs))
        with pytest.raises(OSError, match=r"(?s)backbone 'me/llava' \(revision 2{40}\).*pass `backbone_name_or_path`"):
            load(tmp_path / "adapter", cache_dir=tmp_path / "empty")


WEIGHTS = "adapter/adapter_model.safetensors"
LORA = "base_model.model.vlm.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
HEAD = "base_model.model.retrieval_projector.linear_2.weight"


class TestWrongAdapter:
    def test_weights(self, saved, inputs, tmp_path):
        model = load(saved / "other")
        expected = embed(model, inputs)
        for number, (change, message) in enumerate(
            [
                (lambda w: w.pop(LORA), r"0\.self_attn\.q_proj\.lora_A\.weight missing instead of \(4, 64\)"),
                (lambda w: w.pop(HEAD), r"retrieval_projector\.linear_2\.weight missing instead of \(16, 64\)"),
                (lambda w: w.update({LORA + "x": torch.ones(1)}), r"\.lora_A\.weightx \(1,\) instead of none"),
                (lambda w: w.update({LORA: torch.ones(5, 64)}), r"lora_A\.weight \(5, 64\) instead of \(4, 64\)"),
                (lambda w: w.update({HEAD: torch.ones(8, 64)}), r"linear_2\.weight \(8, 64\) instead of \(16, 64\)"),
            ]
        ):
            with pytest.raises(ValueError, match=message):
                model.load_sugar_adapter(changed(saved, "adapter", tmp_path / str(number), WEIGHTS, change), "wrong")
        assert torch.equal(embed(model, inputs), expected) and model.peft_config.keys() == {"default"}

    def test_without_a_head(self, saved, tmp_path):
        trained(saved / "llava", modules_to_save=None).get_base_model().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"retrieval_projector\.linear_1\.bias missing"):
            load(tmp_path)

    def test_another_backbone(self, saved, tmp_path):
        tiny.llava().save_pretrained(tmp_path / "narrower")
        with pytest.raises(ValueError, match=r"narrower' lacks weights: .* \(384, 32\) instead of \(384, 64\)"):
            load(saved / "adapter", backbone_name_or_path=str(tmp_path / "narrower"))
        model = load(tmp_path / "narrower", retrieval_dim=16)
        with pytest.raises(ValueError, match=r"does not fit this backbone: .* \(4, 64\) instead of \(4, 32\)"):
            model.load_sugar_adapter(saved / "adapter")

    @pytest.mark.parametrize(
        "tied, settings",
        [
            (False, {"trainable_token_indices": [5, 6, 300]}),
            (False, {"target_modules": ["q_proj", "embed_tokens"], "use_dora": False}),
            (True, {"target_modules": ["q_proj", "embed_tokens"]}),
            (True, {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True}),
            (True, {"modules_to_save": ["retrieval_projector", "lm_head"]}),
            (True, {"modules_to_save": ["retrieval_projector", "embed_tokens"], "ensure_weight_tying": True}),
            (True, {"trainable_token_indices": [5, 6, 300]}),
        ],
    )
    def test_whatever_peft_trains(self, inputs, plain, tmp_path, tied, settings):
        """Saved, loaded, exported and merged, it computes the same; also where PEFT's own merge adds a change twice."""
        llava = tiny.llava(tied=tied)
        llava.save_pretrained(tmp_path / "llava")

        @torch.no_grad()
        def check(model):
            if isinstance(model, SugarForConditionalGeneration):
                torch.testing.assert_close(embed(model, inputs), embeddings, atol=1e-5, rtol=0)
            torch.testing.assert_close(model.eval()(**plain).logits, logits, atol=1e-5, rtol=0)

        exclude = r"(?!vlm\.model\.language_model\.|vlm\.lm_head).*"
        model = trained(tmp_path / "llava", exclude_modules=exclude, **settings)
        embeddings, logits = embed(model, inputs), model(**plain).logits.detach()
        model.get_base_model().save_pretrained(tmp_path / "adapter")
        model = load(tmp_path / "adapter")
        check(model)
        model.export_adapter(tmp_path / "stock")
        check(PeftModel.from_pretrained(llava, tmp_path / "stock"))
        check(model.merge_and_unload())
        assert not model.config.name_or_path  # an adapter trained on this does not go on the backbone alone
        assert all(parameter.requires_grad for parameter in model.parameters())
        model.save_pretrained(tmp_path / "merged")
        check(load(tmp_path / "merged"))
        model.export_backbone(tmp_path / "exported")
        check(LlavaForConditionalGeneration.from_pretrained(tmp_path / "exported"))

    def test_what_no_adapter_can_bring_is_refused(self, saved, tmp_path):
        with pytest.raises(ValueError, match="`bias='all'` changes the backbone's own biases"):
            trained(saved / "llava", bias="all").get_base_model().save_pretrained(tmp_path)
        assert not contents(tmp_path)

    def test_another_backbone_of_the_same_shapes(self, saved, tmp_path):
        """Only one of its matrices is another one."""
        key = "language_model.model.layers.1.mlp.up_proj.weight"
        other = changed(saved, "llava", tmp_path, "model.safetensors", lambda weights: weights[key].mul_(1.1))
        model = load(other, retrieval_dim=16)
        message = r"trained on '.*llava'.*another backbone, '.*llava'.*the weights are not"
        with pytest.raises(ValueError, match=message):
            model.load_sugar_adapter(saved / "adapter")
        assert not hasattr(model, "peft_config")

    @pytest.mark.parametrize("who", ["PEFT", "the model"])
    def test_a_merged_backbone_does_not_pass_for_the_one_it_was(self, saved, inputs, tmp_path, who):
        if who == "PEFT":
            model = trained(saved / "llava").merge_and_unload()
        else:
            model = load(saved / "adapter").merge_and_unload()
        model.vlm.save_pretrained(tmp_path / "merged")
        model = trained(model)
        expected = embed(model, inputs)
        assert model.get_base_model().backbone_source() == ("", None)
        model.get_base_model().save_pretrained(tmp_path / "adapter")
        with pytest.raises(ValueError, match="another backbone"):
            load(tmp_path / "adapter", backbone_name_or_path=str(saved / "llava"))
        again = load(tmp_path / "adapter", backbone_name_or_path=str(tmp_path / "merged"))
        torch.testing.assert_close(embed(again, inputs), expected, atol=1e-6, rtol=0)

    def test_backbone_that_lacks_weights(self, saved, tmp_path):
        key = "language_model.lm_head.weight"
        broken = changed(saved, "llava", tmp_path, "model.safetensors", lambda weights: weights.pop(key))
        with pytest.raises(ValueError, match=r"checkpoint '.*llava' lacks weights: vlm\.lm_head\.weight"):
            load(saved / "adapter", backbone_name_or_path=str(broken))

    def test_other_pooling(self, saved):
        model = load(saved / "llava", retrieval_dim=16, image_pooling="last")
        with pytest.raises(ValueError, match="has image_pooling='mean': load the model with the same"):
            model.load_sugar_adapter(saved / "adapter")


class TestFingerprint:
    @pytest.mark.parametrize(
        "settings",
        [{"dtype": "bfloat16"}, {"dtype": "float16"}, {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}],
    )
    def test_precision_and_adapters_do_not_matter(self, saved, settings):
        found = fingerprint(load(saved / "llava").vlm)
        assert same_fingerprint(fingerprint(load(saved / "llava", **settings).vlm), found)
        assert fingerprint(load(saved / "adapter").vlm) == found

    def test_of_the_whole_model_everything_counts(self, saved):
        model = load(saved / "adapter")
        model.load_sugar_adapter(saved / "other", "other")
        found = {"other": fingerprint(model, adapters=True)}
        model.set_adapter("default")
        found["default"] = fingerprint(model, adapters=True)
        model.disable_adapters()
        found["none"] = fingerprint(model, adapters=True)
        assert not any(same_fingerprint(a, b) for a, b in combinations(found.values(), 2))
        again = load(saved / "other", dtype="bfloat16")
        assert same_fingerprint(fingerprint(again, adapters=True), found["other"])

    def test_every_weight_counts(self, saved):
        model = load(saved / "full")
        found = fingerprint(model)
        for name, weight in model.named_parameters():
            before = weight.data.clone()
            weight.data += 0.05 * before.abs().mean() + 1e-3
            assert not same_fingerprint(fingerprint(model), found), name
            weight.data = before
        assert fingerprint(model) == found
        assert not same_fingerprint(found, "0123456789abcdef")
