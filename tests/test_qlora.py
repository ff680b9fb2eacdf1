import json
import time
from functools import partial

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model_state_dict
from tiny_runs import caption, config, conversation, history, rows, story
from transformers import BitsAndBytesConfig, LlavaConfig, LlavaForConditionalGeneration, TrainerCallback
from trl import ModelConfig, TrlParser


pytest.importorskip("bitsandbytes")

from bitsandbytes.nn import Linear4bit, Linear8bitLt  # noqa: E402

from hf_sugar import (  # noqa: E402
    SugarConfig,
    SugarForConditionalGeneration,
    SugarProcessor,
    SugarTrainer,
    SugarTrainingConfig,  # noqa: E402
)
from hf_sugar.cli.main import main  # noqa: E402
from hf_sugar.cli.train import ModelArguments, quantization_config  # noqa: E402
from hf_sugar.memory import LiveBytes, estimate_memory  # noqa: E402
from hf_sugar.training.loading import train_through_4bit  # noqa: E402


ROWS = [conversation, caption, story]
LORA = dict(r=4, lora_alpha=8, lora_dropout=0.0)
NF4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4")


# every dimension a multiple of 64, a block of bitsandbytes
llava = partial(tiny.llava, hidden_size=64, vision_hidden_size=64)


@pytest.fixture(scope="module")
def backbone(saved):
    return str(saved / "llava")


def make(backbone, path, teachers, peft=LORA, quantization=None, **kwargs):
    return SugarTrainer(
        backbone,
        config(path, teachers, **{"load_in_4bit": quantization is None, **kwargs}),
        train_dataset=rows(ROWS),
        eval_dataset=rows([caption], 6),
        peft_config=LoraConfig(**peft),
        quantization_config=quantization,
    )


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.norms = {n: p.grad.norm().item() for n, p in model.named_parameters() if p.requires_grad}

    def on_train_end(self, *args, **kwargs):
        assert all(norm > 0 for norm in self.norms.values()), self.norms


@pytest.fixture(scope="module")
def trained(backbone, teachers, tmp_path_factory):
    """Evaluated before and while it is trained, which is when bitsandbytes would pack the weights."""
    path = tmp_path_factory.mktemp("trained")
    steps = dict(max_steps=12, save_strategy="steps", save_steps=6, eval_strategy="steps", eval_steps=6)
    trainer = make(backbone, path, teachers, **steps)
    trainer.evaluate()
    trainer.add_callback(gradients := Gradients())
    trainer.train()
    trainer.save_model()
    return trainer, gradients


def inputs(trainer):
    return trainer.processing_class.embed_inputs(["a red circle", [tiny.image(1), "what is this?"]])


def embeddings(model, batch):
    with torch.no_grad():
        return model.eval().embed(**batch)


def test_what_is_quantized(trained):
    model = trained[0].model.get_base_model()
    kinds = {name: type(module) for name, module in model.named_modules()}
    quantized = [name for name, kind in kinds.items() if kind is Linear4bit]
    assert any(".vision_tower." in name for name in quantized)
    assert any(".multi_modal_projector." in name for name in quantized)
    assert sum(name.endswith("q_proj.base_layer") for name in quantized) == 2
    assert not any("lm_head" in name or "retrieval_projector" in name for name in quantized)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            assert (state.quant_type, state.nested, module.compute_dtype) == ("nf4", True, torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.dtype == torch.bfloat16
        elif "norm" in name or "lm_head" in name or "embed" in name or "retrieval_projector" in name:
            assert parameter.dtype == torch.float32, name


def test_trains(trained):
    trainer, gradients = trained
    losses = history(trainer, "loss")
    assert sum(losses[-3:]) < 0.97 * sum(losses[:3])
    assert len(gradients.norms) == 8 + 3


@pytest.mark.parametrize("kind", [SugarForConditionalGeneration, LlavaForConditionalGeneration])
def test_loaded_and_used_before(backbone, teachers, tmp_path, kind):
    """A 4-bit model that answered, and so packed its weights, before it was given to the trainer."""
    quantization = BitsAndBytesConfig(**NF4)
    model = kind.from_pretrained(backbone, quantization_config=quantization)
    processor = SugarProcessor.from_pretrained(backbone)
    batch = processor.embed_inputs(["a red circle"])
    del batch["slice_ids"]
    with torch.no_grad():
        model.eval()(**batch)
    data = {"train_dataset": rows(ROWS), "processing_class": processor}
    trainer = SugarTrainer(model, config(tmp_path, teachers), **data, peft_config=LoraConfig(**LORA))
    trainer.add_callback(Gradients())
    trainer.train()


def test_resumes(trained, backbone, teachers, tmp_path):
    trainer = trained[0]
    again = make(backbone, tmp_path, teachers, max_steps=12, eval_strategy="steps", eval_steps=6)
    again.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-6")
    assert history(again, "loss") == history(trainer, "loss")
    expected = get_peft_model_state_dict(trainer.model)
    found = get_peft_model_state_dict(again.model)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_reloads(trained):
    trainer = trained[0]
    directory, batch = trainer.args.output_dir, inputs(trainer)
    expected = embeddings(trainer.model, batch)
    with open(f"{directory}/config.json") as file:
        assert "quantization_config" not in json.load(file)

    quantization = BitsAndBytesConfig(**NF4, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
    model = SugarForConditionalGeneration.from_pretrained(directory, quantization_config=quantization)
    assert any(isinstance(module, Linear4bit) for module in model.modules())
    train_through_4bit(model)  # packed, the arithmetic is another
    torch.testing.assert_close(embeddings(model, batch), expected, atol=1e-6, rtol=0)

    full = SugarForConditionalGeneration.from_pretrained(directory)
    assert not any(isinstance(module, Linear4bit) for module in full.modules())
    assert full.retrieval_projector.linear_1.weight.dtype == torch.float32
    cosines = (embeddings(full, batch) * expected).sum(-1)
    assert cosines.min() > 0.95 and cosines.max() < 1 - 1e-7


def test_merges_in_full_precision_only(trained, tmp_path):
    """Rounded to 4 bits again, the sum would give other embeddings."""
    directory, batch = trained[0].args.output_dir, inputs(trained[0])
    quantization = BitsAndBytesConfig(**NF4)
    model = SugarForConditionalGeneration.from_pretrained(directory, quantization_config=quantization)
    expected = embeddings(model, batch)
    for merge in (model.merge_and_unload, lambda: model.export_backbone(tmp_path / "plain", merge=True)):
        with pytest.raises(ValueError, match="quantized.*without `quantization_config`"):
            merge()
    assert torch.equal(embeddings(model, batch), expected) and not (tmp_path / "plain").exists()

    full = SugarForConditionalGeneration.from_pretrained(directory)
    expected = embeddings(full, batch)
    full.export_backbone(tmp_path / "plain", merge=True)
    torch.testing.assert_close(embeddings(full, batch), expected, atol=1e-5, rtol=0)
    LlavaForConditionalGeneration.from_pretrained(tmp_path / "plain")


def test_the_projector_stays_exact(backbone, teachers, tmp_path):
    wrapper = make(backbone, tmp_path, teachers).model.get_base_model().retrieval_projector
    assert torch.equal(wrapper.linear_1.weight, wrapper.original_module.linear_1.weight)
    assert not torch.equal(wrapper.linear_1.weight, wrapper.linear_1.weight.bfloat16().float())
    for quantization in (None, BitsAndBytesConfig(load_in_4bit=True)):
        model = SugarForConditionalGeneration.from_backbone(
            backbone, dtype=torch.bfloat16, quantization_config=quantization
        )
        assert model.retrieval_projector.linear_1.weight.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_8bit(backbone, teachers, tmp_path):
    trainer = make(backbone, tmp_path, teachers, quantization=BitsAndBytesConfig(load_in_8bit=True), max_steps=3)
    trainer.evaluate()
    trainer.add_callback(Gradients())
    trainer.train()
    assert any(isinstance(module, Linear8bitLt) for module in trainer.model.modules())
    assert trainer.model.get_base_model().retrieval_projector.linear_1.weight.dtype == torch.float32


@pytest.mark.parametrize("parsed", [ModelArguments, ModelConfig])
def test_command_line(trained, parsed):
    """The setting is there once, and asks for the same as the one of the training configuration."""
    parser = TrlParser((SugarTrainingConfig, parsed))
    arguments = ["--load_in_4bit", "--use_cpu", "True", "--output_dir", "unused"]
    _, model = parser.parse_args_and_config(arguments)
    if parsed is ModelArguments:
        asked = trained[0].model.get_base_model().config.quantization_config
        assert quantization_config(model).to_dict() == asked.to_dict()
        assert (model.lora_r, model.lora_alpha) == (128, 256)


def test_loaded_model_cannot_be_quantized(teachers, tmp_path):
    with pytest.raises(ValueError, match="need the Hub id or directory"):
        SugarTrainer(llava(), config(tmp_path, teachers, load_in_4bit=True), train_dataset=rows(ROWS))


class TestMemory:
    @pytest.mark.parametrize("double", [True, False])
    def test_weights_are_those_of_bitsandbytes(self, backbone, teachers, tmp_path, double):
        quantization = BitsAndBytesConfig(
            **NF4, bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=torch.bfloat16
        )
        trainer = make(backbone, tmp_path, teachers, quantization=quantization)
        quantized = 0
        for module in trainer.model.modules():
            if isinstance(module, Linear4bit):
                stored = {k: v.nbytes for k, v in module.state_dict().items() if k != "bias"}
                # numbers that are not on the GPU, but for the offset
                stored.pop("weight.quant_state.bitsandbytes__nf4")
                quantized += sum(stored.values()) + (4 if double else 0)
        packed = sum(m.weight.nbytes for m in trainer.model.modules() if isinstance(m, Linear4bit))
        weights = sum(p.nbytes for p in trainer.model.parameters()) - packed
        learned = [p for p in trainer.model.parameters() if p.requires_grad]

        estimate = estimate_memory(
            SugarConfig.from_pretrained(backbone, retrieval_dim=16), trainer.args, LoraConfig(**LORA), quantization
        )
        assert estimate.parts["backbone, quantized"] == quantized
        assert estimate.trained == trainer.model.get_nb_trainable_parameters()[0]
        assert estimate.parts["trained weights (adapters, projector)"] == sum(p.nbytes for p in learned)
        loaded = estimate.parts["backbone and projector as loaded, not quantized"]
        buffers = sum(b.nbytes for b in trainer.model.buffers())
        assert loaded == weights + buffers - sum(p.nbytes for p in learned)
        assert estimate.parameters == sum(p.numel() for p in llava().parameters()) + 64 * 64 + 64 + 64 * 16

    @pytest.mark.parametrize("checkpointing,bf16,quantized", [(False, False, True), (True, True, False)])
    def test_activations_are_those_of_a_step(self, teachers, tmp_path, monkeypatch, checkpointing, bf16, quantized):
        """The estimate without data against the bytes alive in a real step of the same shape."""
        # a small tile of logits, or it would hide all else in so small a model
        monkeypatch.setattr("trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE", 64)
        monkeypatch.setattr("hf_sugar.memory._CHUNKED_LOGPROB_CHUNK_SIZE", 64)
        directory = str(tmp_path / "llava")
        llava(layers=8).save_pretrained(directory)
        tiny.processor().save_pretrained(directory)
        trainer = make(directory, tmp_path, teachers, gradient_checkpointing=checkpointing, load_in_4bit=quantized)
        if checkpointing:
            trainer.model.gradient_checkpointing_enable()
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        trainer.args.max_length = batch["input_ids"].shape[1]
        trainer.args.bf16 = bf16
        trainer.model.train()
        for _ in range(2):  # the first makes the gradients
            with LiveBytes() as live:
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    loss = trainer.compute_loss(trainer.model, dict(batch))
                loss.backward()
                del loss
        estimate = estimate_memory(
            SugarConfig.from_pretrained(directory, retrieval_dim=16),
            trainer.args,
            LoraConfig(**LORA),
            trainer.model.get_base_model().config.quantization_config if quantized else None,
        )
        assert estimate.parts["activations and working space, peak"] == pytest.approx(live.peak, rel=0.08)
        # nothing asks for gradients of the frozen tower
        tower = trainer.model.get_base_model().vlm.model.vision_tower
        assert not tower(pixel_values=batch["pixel_values"]).last_hidden_state.requires_grad

    def test_command(self, tmp_path, capsys):
        layers = 8  # of the 32 of 7B
        text = {"model_type": "llama", "num_hidden_layers": layers}
        LlavaConfig(text_config=text, architectures=["LlavaForConditionalGeneration"]).save_pretrained(tmp_path)
        meta = SugarConfig.from_pretrained(tmp_path)
        with torch.device("meta"):
            parameters = SugarForConditionalGeneration(meta).num_parameters()
        assert parameters == pytest.approx(2.226e9, rel=1e-3)
        arguments = ["train", "--estimate-memory", "--config", "examples/qlora_7b.yaml"]
        begin = time.process_time()
        main([*arguments, "--model_name_or_path", str(tmp_path), "--per_device_train_batch_size", "1"])
        assert time.process_time() - begin < 20
        printed = capsys.readouterr().out
        lora = layers * 2 * 2 * 4096 * 128
        projector = 4096 * 4096 + 4096 + 4096 * 768
        assert f"{parameters / 1e9:.2f} billion parameters, {(lora + projector) / 1e6:.1f} million trained" in printed
        assert "| 12 GB | yes |" in printed and "not measured" in printed
