"""Checkpoints on their way out and in again: with the code in them, without this library, and as adapters."""

import json
import os
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import test_trainer
import tiny
import torch
import transformers
from packaging import version
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    BitsAndBytesConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    logging,
)
from transformers.dynamic_module_utils import get_imports

from hf_sugar import (
    SugarConfig,
    SugarForConditionalGeneration,
    SugarProcessor,
    SugarTrainer,
    models,
)
from hf_sugar.models.fingerprint_sugar import fingerprint, same_fingerprint


MODULES = sorted(Path(models.__file__).parent.glob("*_sugar.py"))
CODE = {file.name for file in MODULES}
MODEL_CLASSES = (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM)
TARGETS = dict(
    r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], exclude_modules=r"(?!vlm\.model\.language_model\.).*"
)
EVIL = "from pathlib import Path\nPath({marker!r}).touch()\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A backbone, a full checkpoint of it, two adapters for it, and an image."""
    place = tmp_path_factory.mktemp("checkpoints")
    tiny.llava().save_pretrained(place / "llava")
    tiny.processor().save_pretrained(place / "llava")
    processor = SugarProcessor.from_pretrained(place / "llava")
    model = SugarForConditionalGeneration.from_backbone(place / "llava", dtype=torch.float32, retrieval_dim=16)
    model.save_pretrained(place / "full")
    for seed, name in enumerate(("adapter", "other")):
        trained(place / "llava", seed).get_base_model().save_pretrained(place / name)
    for name in ("full", "adapter", "other"):
        processor.save_pretrained(place / name)
    tiny.image(3).save(place / "photo.png")
    return place


@pytest.fixture(scope="module")
def inputs(place):
    return SugarProcessor.from_pretrained(place / "full").embed_inputs(items(place))


def items(place):
    photo = {"type": "image", "image": str(place / "photo.png")}
    return ["a red circle", photo, [photo, "what is this?"]]


def trained(backbone, seed=0, **settings) -> PeftModel:
    """What comes out of a training with LoRA, but for the training."""
    settings = {"modules_to_save": ["retrieval_projector"], **TARGETS, **settings}
    if not isinstance(backbone, SugarForConditionalGeneration):
        backbone = SugarForConditionalGeneration.from_backbone(backbone, dtype=torch.float32, retrieval_dim=16)
    model = get_peft_model(backbone, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.2, generator=generator)
    return model.eval()


@torch.no_grad()
def embed(model, inputs):
    # PyTorch multiplies in another order, with other bits on some CPUs, where a weight wants a gradient.
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    embeddings = model.embed(**inputs)
    for parameter in trainable:
        parameter.requires_grad_(True)
    return embeddings


def contents(directory) -> set[str]:
    return {file.relative_to(directory).as_posix() for file in Path(directory).rglob("*") if file.is_file()}


def changed(place, name, tmp_path, file, change) -> Path:
    """A copy of a checkpoint in which `change` was applied to the content of a safetensors or JSON file."""
    copy = shutil.copytree(place / name, tmp_path / name)
    if file.endswith(".json"):
        value = json.loads((copy / file).read_text())
        change(value)
        (copy / file).write_text(json.dumps(value))
    else:
        value = load_file(copy / file)
        change(value)
        save_file(value, copy / file, metadata={"format": "pt"})
    return copy


def run_without_the_library(script: str, tmp_path, *arguments, **environment) -> dict:
    script = (
        "import json, sys\n"
        "sys.modules['hf_sugar'] = None\n"
        "import torch\n"
        "torch.set_num_threads(1)\n"
        "from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig\n"
        f"{script}\n"
        "assert not any(name.startswith('hf_sugar.') for name in sys.modules)\n"
        "json.dump(result, open('result.json', 'w'))\n"
    )
    kept = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    (tmp_path / "elsewhere").mkdir()
    run = subprocess.run(
        [sys.executable, "-I", "-c", script, *map(str, arguments)],
        cwd=tmp_path / "elsewhere",
        env={**kept, **environment},
        stdin=subprocess.DEVNULL,  # a question of transformers is answered by the end of the file
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    return json.loads((tmp_path / "elsewhere" / "result.json").read_text()) | {"stderr": run.stderr}


FULL = """
sys.modules['peft'] = None
path, items, cache, first, second = sys.argv[1], json.loads(sys.argv[2]), *sys.argv[3:]
result = {"errors": {}}
for auto in (AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor):
    try:
        auto.from_pretrained(path)
    except ValueError as error:
        result["errors"][auto.__name__] = str(error)

trust = dict(trust_remote_code=True)
config = AutoConfig.from_pretrained(path, **trust)
processor = AutoProcessor.from_pretrained(path, **trust)
inputs = processor.embed_inputs(items)
model = AutoModel.from_pretrained(path, dtype=torch.float32, **trust)
again = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, device_map="cpu", **trust)
assert type(model) is type(again) and type(model.config) is type(config) is type(model).config_class
with torch.no_grad():
    result["embeddings"] = model.embed(**inputs).tolist()
    result["again"] = again.embed(**inputs).tolist()
    plain = {key: value for key, value in inputs.items() if key != "slice_ids"}
    result["generated"] = again.generate(**plain, max_new_tokens=5).tolist()
    for attention in ("eager", "sdpa"):
        model = AutoModel.from_pretrained(path, attn_implementation=attention, **trust)
        configs = [model.vlm.config.text_config, model.vlm.config.vision_config, model.vlm.model.language_model.config]
        assert {config._attn_implementation for config in configs} == {attention}
        result[attention] = model.embed(**inputs).tolist()
    model = AutoModel.from_pretrained(path, dtype=torch.bfloat16, **trust)
    assert model.get_output_embeddings().weight.dtype == torch.bfloat16
    assert model.retrieval_projector.linear_1.weight.dtype == torch.float32
    result["bfloat16"] = model.embed(**inputs).tolist()

# saved again from the code that came with it
model.from_pretrained(path, **trust).save_pretrained("copy")
processor.save_pretrained("copy")
with torch.no_grad():
    result["copy"] = AutoModel.from_pretrained("copy", **trust).embed(**inputs).tolist()

def load(**revisions):
    model = AutoModel.from_pretrained("me/full", cache_dir=cache, **trust, **revisions)
    return sys.modules[type(model).__module__].VERSION, model.retrieval_projector.linear_2.weight[0, 0].item()

result["main"] = load()
result["first"] = load(revision=first)
result["code"] = load(revision=first, code_revision=second)
"""


def hub_repository(cache: Path, repo_id: str, versions: dict[str, Path]) -> None:
    """What huggingface_hub leaves in its cache for these commits of a repository; the last one is `main`."""
    root = cache / f"models--{repo_id.replace('/', '--')}"
    for commit, directory in versions.items():
        shutil.copytree(directory, root / "snapshots" / commit)
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / "main").write_text(commit)


FIRST, SECOND = "1" * 40, "2" * 40


class TestFullCheckpoint:
    def test_files(self, place):
        processor = {"processor_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
        weights = {"config.json", "generation_config.json", "model.safetensors"}
        assert contents(place / "full") == CODE | processor | weights
        auto_map = json.loads((place / "full" / "config.json").read_text())["auto_map"]
        assert auto_map.keys() == {"AutoConfig", *(auto.__name__ for auto in MODEL_CLASSES)}
        assert "auto_map" not in json.loads((place / "full" / "config.json").read_text())["vlm_config"]

    @pytest.mark.parametrize("file", MODULES, ids=lambda file: file.name)
    def test_code_needs_only_transformers_and_what_that_needs(self, file):
        assert set(get_imports(file)) - set(sys.stdlib_module_names) <= {
            "PIL",
            "huggingface_hub",
            "jinja2",
            "numpy",
            "safetensors",
            "torch",
            "transformers",
        }

    def test_without_the_library(self, place, inputs, tmp_path):
        key = "retrieval_projector.linear_2.weight"
        versions = {}
        for commit, value in ((FIRST, 1.0), (SECOND, 2.0)):
            versions[commit] = changed(
                place, "full", tmp_path / commit, "model.safetensors", lambda weights, v=value: weights[key].fill_(v)
            )
            with open(versions[commit] / "modeling_sugar.py", "a") as file:
                file.write(f"VERSION = {value}\n")
        hub_repository(tmp_path / "hub", "me/full", versions)
        result = run_without_the_library(
            FULL, tmp_path, place / "full", json.dumps(items(place)), tmp_path / "hub", FIRST, SECOND
        )
        model = SugarForConditionalGeneration.from_pretrained(place / "full")
        expected = embed(model, inputs)
        for name in ("embeddings", "again", "sdpa", "copy"):
            torch.testing.assert_close(torch.tensor(result[name]), expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(torch.tensor(result["eager"]), expected, atol=1e-5, rtol=0)
        assert 0 < (torch.tensor(result["bfloat16"]) - expected).abs().max() < 0.05
        plain = {key: value for key, value in inputs.items() if key != "slice_ids"}
        assert result["generated"] == model.generate(**plain, max_new_tokens=5).tolist()
        # transformers' own message
        assert result["errors"].keys() == {"AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor"}
        assert all("`trust_remote_code=True`" in message for message in result["errors"].values())
        assert (result["main"], result["first"], result["code"]) == ([2.0, 2.0], [1.0, 1.0], [2.0, 1.0])
        assert "Traceback" not in result["stderr"]

    def test_with_the_library_no_flag_and_no_code_of_the_repository(self, place, inputs, tmp_path, monkeypatch):
        """Nor a question on standard input. With the flag, the installed code is the one that runs."""
        monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
        copy = shutil.copytree(place / "full", tmp_path / "full")
        for name in CODE:
            with open(copy / name, "a") as file:
                file.write(EVIL.format(marker=str(tmp_path / "ran")))
        for flag in ({}, {"trust_remote_code": True}):
            assert type(AutoConfig.from_pretrained(copy, **flag)) is SugarConfig
            for auto in MODEL_CLASSES:
                assert type(auto.from_pretrained(copy, **flag)) is SugarForConditionalGeneration
            for auto in (AutoProcessor, SugarProcessor):
                processor = auto.from_pretrained(copy, **flag)
                assert isinstance(processor, SugarProcessor) and isinstance(processor, LlavaProcessor)
                assert torch.equal(processor.embed_inputs(items(place))["input_ids"], inputs["input_ids"])
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize(
        "name, file", [("full", "model"), ("llava", "model"), ("adapter", "adapter/adapter_model")]
    )
    def test_pickles_are_not_loaded(self, place, tmp_path, name, file):
        copy = shutil.copytree(place / name, tmp_path / name)
        weights = copy / f"{file}.safetensors"
        torch.save(load_file(weights), weights.with_name(f"{'pytorch_' * (name != 'adapter')}{Path(file).name}.bin"))
        weights.unlink()
        with pytest.raises(OSError, match=f"{Path(file).name}.safetensors"):
            SugarForConditionalGeneration.from_pretrained(copy)


ADAPTER = """
path, backbone, items, cache = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4]
wide = sys.argv[5:]
result = {}
trust = dict(trust_remote_code=True)
try:
    AutoModel.from_pretrained(path)
except ValueError as error:
    result["error"] = str(error)
processor = AutoProcessor.from_pretrained(path, **trust)
inputs = processor.embed_inputs(items)
plain = {key: value for key, value in inputs.items() if key != "slice_ids"}
quantization = BitsAndBytesConfig(load_in_8bit=True)
with torch.no_grad():
    for name, where, auto, settings in (
        ("first", path, AutoModel, {}),
        ("auto", path, AutoModelForImageTextToText, {"device_map": "cpu"}),
        ("eager", path, AutoModel, {"attn_implementation": "eager"}),
        ("bfloat16", path, AutoModel, {"dtype": torch.bfloat16}),
        ("8bit", path, AutoModel, {"quantization_config": quantization}),
        ("hub", "me/adapter", AutoModel, {"cache_dir": cache}),
        ("moved", path, AutoModel, {"backbone_name_or_path": backbone}),
    ):
        model = auto.from_pretrained(where, **{"dtype": torch.float32, **settings}, **trust)
        result[name] = model.embed(**inputs).tolist()
        if name == "first":
            result["generated"] = model.generate(**plain, max_new_tokens=5).tolist()
            model.save_pretrained("copy")
            processor.save_pretrained("copy")
    result["copy"] = AutoModel.from_pretrained("copy", **trust).embed(**inputs).tolist()
    result["merged"] = model.merge_and_unload().embed(**inputs).tolist()
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    for path in wide:
        model = AutoModel.from_pretrained(path, dtype=torch.float32, quantization_config=quantization, **trust)
        assert type(model.vlm.model.language_model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
        assert not any(type(m).__name__ == "Linear4bit" for m in model.retrieval_projector.modules())
        result[path] = model.embed(**inputs).tolist()
"""


class TestAdapter:
    def test_files(self, place):
        adapter = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
        processor = {"processor_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
        assert contents(place / "adapter") == CODE | processor | adapter | {"config.json"}
        config = json.loads((place / "adapter" / "adapter" / "adapter_config.json").read_text())
        assert config["auto_mapping"] is None
        assert config["base_model_name_or_path"] == str(place / "llava")  # what the user gave

    def test_without_the_library(self, place, inputs, tmp_path):
        """The code of the backbone's repository is not run, though the flag is set: only its weights are read."""
        marker = str(tmp_path / "ran")
        auto_map = {"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoModelForImageTextToText": "evil.M"}
        backbone = changed(
            place, "llava", tmp_path / "evil", "config.json", lambda config: config.update(auto_map=auto_map)
        )
        (backbone / "evil.py").write_text(EVIL.format(marker=marker))
        wrong = changed(
            place,
            "llava",
            tmp_path / "wrong",
            "model.safetensors",
            lambda weights: [value.zero_() for value in weights.values()],
        )
        hub_repository(tmp_path / "hub", "me/llava", {FIRST: backbone, SECOND: wrong})
        adapter = changed(
            place,
            "adapter",
            tmp_path / "named",
            "config.json",
            lambda config: config.update(backbone_name_or_path="me/llava", backbone_revision=FIRST),
        )
        hub_repository(tmp_path / "hub", "me/adapter", {SECOND: adapter})
        # for 4 bits every dimension is a multiple of 64
        wide = {}
        tiny.llava(hidden_size=64, vision_hidden_size=64).save_pretrained(tmp_path / "wide")
        full = SugarForConditionalGeneration.from_backbone(tmp_path / "wide", dtype=torch.float32, retrieval_dim=16)
        for name, model in (("wide_full", full.eval()), ("wide_adapter", trained(tmp_path / "wide"))):
            (model if model is full else model.get_base_model()).save_pretrained(tmp_path / name)
            wide[str(tmp_path / name)] = embed(model, inputs)
        result = run_without_the_library(
            ADAPTER, tmp_path, place / "adapter", backbone, json.dumps(items(place)), tmp_path / "hub", *wide
        )
        peft_model = trained(place / "llava")
        expected = embed(peft_model, inputs)
        for name in ("first", "auto", "hub", "moved", "copy"):
            torch.testing.assert_close(torch.tensor(result[name]), expected, atol=1e-6, rtol=0)
        for name in ("merged", "eager"):
            torch.testing.assert_close(torch.tensor(result[name]), expected, atol=1e-5, rtol=0)
        for name in ("bfloat16", "8bit"):
            assert 0 < (torch.tensor(result[name]) - expected).abs().max() < 0.05
        for name, expected in wide.items():
            assert 0 < (torch.tensor(result[name]) - expected).abs().max() < 0.5
        plain = {key: value for key, value in inputs.items() if key != "slice_ids"}
        assert result["generated"] == peft_model.generate(**plain, max_new_tokens=5).tolist()
        assert "`trust_remote_code=True`" in result["error"]
        assert not Path(marker).exists()
        assert "MISSING" not in result["stderr"]

    @pytest.mark.parametrize("name", ["adapter", "llava"])
    def test_no_report_of_a_projector_that_is_new_or_comes_later(self, place, capfd, name):
        logging.enable_propagation()
        try:
            model, info = AutoModel.from_pretrained(place / "adapter", output_loading_info=True)
            SugarForConditionalGeneration.from_pretrained(place / name)
        finally:
            logging.disable_propagation()
        assert not any(word in "".join(capfd.readouterr()) for word in ("MISSING", "retrieval_projector"))
        assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
        assert not info["unexpected_keys"] and not info["mismatched_keys"]

    def test_saved_again_it_is_an_adapter_again(self, place, inputs, tmp_path):
        model = SugarForConditionalGeneration.from_pretrained(place / "adapter")
        model.save_pretrained(tmp_path)
        assert contents(tmp_path) == contents(place / "adapter") - contents(place / "full") | {
            "config.json",
            *CODE - {"processing_sugar.py", "rows_sugar.py"},
        }
        assert json.loads((tmp_path / "config.json").read_text()) == json.loads(
            (place / "adapter" / "config.json").read_text()
        )
        again = SugarForConditionalGeneration.from_pretrained(tmp_path)
        assert torch.equal(embed(again, inputs), embed(model, inputs))

    def test_several_are_switched_with_their_projectors(self, place, inputs, tmp_path):
        names = ("adapter", "other")
        alone = {n: embed(SugarForConditionalGeneration.from_pretrained(place / n), inputs) for n in names}
        model = SugarForConditionalGeneration.from_pretrained(place / "adapter")
        model.load_sugar_adapter(place / "other", "other")
        assert torch.equal(embed(model, inputs), alone["other"])
        model.set_adapter("default")
        assert torch.equal(embed(model, inputs), alone["adapter"])
        model.disable_adapters()
        assert not torch.equal(embed(model, inputs), alone["adapter"])
        model.enable_adapters()
        assert torch.equal(embed(model, inputs), alone["adapter"])
        model.set_adapter("other")
        model.save_pretrained(tmp_path)
        assert torch.equal(embed(SugarForConditionalGeneration.from_pretrained(tmp_path), inputs), alone["other"])
        with pytest.raises(ValueError, match="the name 'other' is attached"):
            model.load_sugar_adapter(place / "other", "other")
        for name in ("third", ["default", "other"]):
            with pytest.raises(ValueError, match="no adapter .*. Name one of these: default, other"):
                model.set_adapter(name)
        assert not any(parameter.requires_grad for parameter in model.parameters())

    def test_checkpoints_of_a_training(self, place, inputs, tmp_path):
        """Each is an adapter repository, and the best one is found again."""
        settings = dict(save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, max_steps=2)
        settings |= dict(structure_weight=0, load_best_model_at_end=True, metric_for_best_model="eval_loss")
        rows = test_trainer.rows([test_trainer.conversation], 4)
        trainer = SugarTrainer(
            str(place / "llava"),
            test_trainer.config(tmp_path, learning_rate=0.1, greater_is_better=True, **settings),  # so the first is it
            rows,
            rows,
            peft_config=LoraConfig(r=4),
        )
        trainer.train()
        first, second = (
            SugarForConditionalGeneration.from_pretrained(tmp_path / f"checkpoint-{step}") for step in (1, 2)
        )
        assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
        plain = {key: value for key, value in inputs.items() if key != "slice_ids"}
        with torch.no_grad():
            found, first, second = (model(**plain).logits for model in (trainer.model.eval(), first, second))
        assert torch.equal(found, first) and not torch.equal(first, second)
        assert AutoProcessor.from_pretrained(tmp_path / "checkpoint-1").chat_template

    def test_with_peft_itself(self, place, inputs):
        model = SugarForConditionalGeneration.from_backbone(
            place / "llava", dtype=torch.float32, retrieval_dim=16
        ).eval()
        model = PeftModel.from_pretrained(model, place / "adapter" / "adapter")
        assert torch.equal(embed(model, inputs), embed(trained(place / "llava"), inputs))

    def test_exports_for_the_stock_class(self, place, inputs, tmp_path):
        """`test_whatever_peft_trains` compares what they compute."""
        model = SugarForConditionalGeneration.from_pretrained(place / "adapter")
        processor = SugarProcessor.from_pretrained(place / "adapter")
        plain = {key: value for key, value in inputs.items() if key != "slice_ids"}
        model.export_adapter(tmp_path / "adapter")
        assert contents(tmp_path / "adapter") == {"adapter_config.json", "adapter_model.safetensors"}
        with torch.no_grad():  # transformers finds the backbone by itself, if it does not ask for a later PEFT
            if version.parse(transformers.__version__) < version.parse("5.24"):
                stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "adapter")
                assert torch.equal(stock(**plain).logits, model(**plain).logits)
        with pytest.raises(ValueError, match="no adapter to export"):
            SugarForConditionalGeneration.from_pretrained(place / "full").export_adapter(tmp_path)
        with pytest.raises(ValueError, match="`merge=True`"):
            model.export_backbone(tmp_path / "backbone")
        model.export_backbone(tmp_path / "backbone", merge=True, processor=processor)
        assert not contents(tmp_path / "backbone") & CODE
        texts = [
            (tmp_path / "backbone" / name).read_text() for name in contents(tmp_path / "backbone") if "json" in name
        ]
        assert "auto_map" not in "".join(texts)
        found, expected = (
            load_file(where / "model.safetensors") for where in (tmp_path / "backbone", place / "llava")
        )
        assert found.keys() == expected.keys()
        stock = AutoProcessor.from_pretrained(tmp_path / "backbone")
        assert type(stock) is LlavaProcessor and stock.chat_template == processor.chat_template
        assert isinstance(processor, SugarProcessor)

    def test_the_commit_of_the_backbone_is_pinned(self, place, inputs, tmp_path):
        hub_repository(tmp_path / "hub", "me/llava", {SECOND: place / "llava"})
        model = SugarForConditionalGeneration.from_backbone("me/llava", cache_dir=tmp_path / "hub", retrieval_dim=16)
        model = get_peft_model(model, LoraConfig(**TARGETS, modules_to_save=["retrieval_projector"])).get_base_model()
        model.save_pretrained(tmp_path / "adapter")
        config = json.loads((tmp_path / "adapter" / "config.json").read_text())
        assert (config["backbone_name_or_path"], config["backbone_revision"]) == ("me/llava", SECOND)
        adapter = json.loads((tmp_path / "adapter" / "adapter" / "adapter_config.json").read_text())
        assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("me/llava", SECOND)
        (tmp_path / "hub" / "models--me--llava" / "refs" / "main").write_text(FIRST)  # something else since
        again = SugarForConditionalGeneration.from_pretrained(tmp_path / "adapter", cache_dir=tmp_path / "hub")
        assert torch.equal(embed(again, inputs), embed(model.eval(), inputs))
        with pytest.raises(OSError, match=r"(?s)backbone 'me/llava' \(revision 2{40}\).*pass `backbone_name_or_path`"):
            SugarForConditionalGeneration.from_pretrained(tmp_path / "adapter", cache_dir=tmp_path / "empty")


WEIGHTS = "adapter/adapter_model.safetensors"
LORA = "base_model.model.vlm.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
HEAD = "base_model.model.retrieval_projector.linear_2.weight"


class TestWrongAdapter:
    def test_weights(self, place, inputs, tmp_path):
        model = SugarForConditionalGeneration.from_pretrained(place / "other")
        expected = embed(model, inputs)
        for number, (change, message) in enumerate(
            [
                (lambda w: w.pop(LORA), r"0\.self_attn\.q_proj\.lora_A\.weight missing instead of \(4, 32\)"),
                (lambda w: w.pop(HEAD), r"retrieval_projector\.linear_2\.weight missing instead of \(16, 32\)"),
                (lambda w: w.update({LORA + "x": torch.ones(1)}), r"\.lora_A\.weightx \(1,\) instead of none"),
                (lambda w: w.update({LORA: torch.ones(5, 32)}), r"lora_A\.weight \(5, 32\) instead of \(4, 32\)"),
                (lambda w: w.update({HEAD: torch.ones(8, 32)}), r"linear_2\.weight \(8, 32\) instead of \(16, 32\)"),
            ]
        ):
            with pytest.raises(ValueError, match=message):
                model.load_sugar_adapter(changed(place, "adapter", tmp_path / str(number), WEIGHTS, change), "wrong")
        assert torch.equal(embed(model, inputs), expected) and model.peft_config.keys() == {"default"}

    def test_without_a_head(self, place, tmp_path):
        trained(place / "llava", modules_to_save=None).get_base_model().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"retrieval_projector\.linear_1\.bias missing"):
            SugarForConditionalGeneration.from_pretrained(tmp_path)

    def test_another_backbone(self, place, tmp_path):
        tiny.llava(hidden_size=64).save_pretrained(tmp_path / "wider")
        with pytest.raises(ValueError, match=r"wider' lacks weights: .* \(384, 64\) instead of \(384, 32\)"):
            SugarForConditionalGeneration.from_pretrained(
                place / "adapter", backbone_name_or_path=str(tmp_path / "wider")
            )
        model = SugarForConditionalGeneration.from_backbone(tmp_path / "wider", retrieval_dim=16)
        with pytest.raises(ValueError, match=r"does not fit this backbone: .* \(4, 32\) instead of \(4, 64\)"):
            model.load_sugar_adapter(place / "adapter")

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
    def test_whatever_peft_trains(self, place, inputs, tmp_path, tied, settings):
        """Saved, loaded, exported and merged, it computes the same; also where PEFT's own merge adds a change twice."""
        llava = tiny.llava(tied=tied)
        llava.save_pretrained(tmp_path / "llava")
        plain = {key: value for key, value in inputs.items() if key != "slice_ids"}

        @torch.no_grad()
        def check(model):
            if isinstance(model, SugarForConditionalGeneration):
                torch.testing.assert_close(embed(model, inputs), embeddings, atol=1e-5, rtol=0)
            torch.testing.assert_close(model.eval()(**plain).logits, logits, atol=1e-5, rtol=0)

        exclude = r"(?!vlm\.model\.language_model\.|vlm\.lm_head).*"
        model = trained(tmp_path / "llava", exclude_modules=exclude, **settings)
        embeddings, logits = embed(model, inputs), model(**plain).logits.detach()
        model.get_base_model().save_pretrained(tmp_path / "adapter")
        model = SugarForConditionalGeneration.from_pretrained(tmp_path / "adapter")
        check(model)
        model.export_adapter(tmp_path / "stock")
        check(PeftModel.from_pretrained(llava, tmp_path / "stock"))
        check(model.merge_and_unload())
        assert not model.config.name_or_path  # an adapter trained on this does not go on the backbone alone
        assert all(parameter.requires_grad for parameter in model.parameters())
        model.save_pretrained(tmp_path / "merged")
        check(SugarForConditionalGeneration.from_pretrained(tmp_path / "merged"))
        model.export_backbone(tmp_path / "exported")
        check(LlavaForConditionalGeneration.from_pretrained(tmp_path / "exported"))

    def test_what_no_adapter_can_bring_is_refused(self, place, tmp_path):
        with pytest.raises(
            ValueError, match="`bias='all'` of the PEFT configuration changes the biases of the backbone"
        ):
            trained(place / "llava", bias="all").get_base_model().save_pretrained(tmp_path)
        assert not contents(tmp_path)

    def test_another_backbone_of_the_same_shapes(self, place, tmp_path):
        """Only one of its matrices is another one."""
        key = "language_model.model.layers.1.mlp.up_proj.weight"
        other = changed(place, "llava", tmp_path, "model.safetensors", lambda weights: weights[key].mul_(1.1))
        model = SugarForConditionalGeneration.from_backbone(other, retrieval_dim=16)
        message = r"another backbone.*the weights are not.*trained on '.*llava'.*this is '.*llava'"
        with pytest.raises(ValueError, match=message):
            model.load_sugar_adapter(place / "adapter")
        assert not hasattr(model, "peft_config")

    @pytest.mark.parametrize("who", ["PEFT", "the model"])
    def test_a_merged_backbone_does_not_pass_for_the_one_it_was(self, place, inputs, tmp_path, who):
        if who == "PEFT":
            model = trained(place / "llava").merge_and_unload()
        else:
            model = SugarForConditionalGeneration.from_pretrained(place / "adapter").merge_and_unload()
        model.vlm.save_pretrained(tmp_path / "merged")
        model = trained(model)
        expected = embed(model, inputs)
        assert model.get_base_model().backbone_source() == ("", None)
        model.get_base_model().save_pretrained(tmp_path / "adapter")
        with pytest.raises(ValueError, match="another backbone"):
            SugarForConditionalGeneration.from_pretrained(
                tmp_path / "adapter", backbone_name_or_path=str(place / "llava")
            )
        again = SugarForConditionalGeneration.from_pretrained(
            tmp_path / "adapter", backbone_name_or_path=str(tmp_path / "merged")
        )
        torch.testing.assert_close(embed(again, inputs), expected, atol=1e-6, rtol=0)

    def test_adapters_from_before_fingerprints(self, place, inputs, tmp_path):
        def change(config):
            config.update(backbone_sample=[0.0] * 16)
            config.pop("backbone_fingerprint")

        model = SugarForConditionalGeneration.from_pretrained(
            changed(place, "adapter", tmp_path, "config.json", change)
        )
        assert torch.equal(embed(model, inputs), embed(trained(place / "llava"), inputs))

    def test_backbone_that_lacks_weights(self, place, tmp_path):
        key = "language_model.lm_head.weight"
        broken = changed(place, "llava", tmp_path, "model.safetensors", lambda weights: weights.pop(key))
        with pytest.raises(ValueError, match=r"checkpoint '.*llava' lacks weights: vlm\.lm_head\.weight"):
            SugarForConditionalGeneration.from_pretrained(place / "adapter", backbone_name_or_path=str(broken))

    def test_other_pooling(self, place):
        model = SugarForConditionalGeneration.from_backbone(place / "llava", retrieval_dim=16, image_pooling="last")
        with pytest.raises(ValueError, match="was trained with image_pooling='mean'; this model has 'last'"):
            model.load_sugar_adapter(place / "adapter")


class TestFingerprint:
    def test_precision_and_adapters_do_not_matter(self, place):
        def load(name="llava", **settings):
            return SugarForConditionalGeneration.from_pretrained(place / name, **settings)

        found = fingerprint(load().vlm)
        for settings in (
            {"dtype": "bfloat16"},
            {"dtype": "float16"},
            {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
        ):
            assert same_fingerprint(fingerprint(load(**settings).vlm), found)
        assert fingerprint(load("adapter").vlm) == found

    def test_of_the_whole_model_everything_counts(self, place):
        model = SugarForConditionalGeneration.from_pretrained(place / "adapter")
        model.load_sugar_adapter(place / "other", "other")
        found = {"other": fingerprint(model, adapters=True)}
        model.set_adapter("default")
        found["default"] = fingerprint(model, adapters=True)
        model.disable_adapters()
        found["none"] = fingerprint(model, adapters=True)
        assert not any(same_fingerprint(a, b) for a, b in combinations(found.values(), 2))
        again = SugarForConditionalGeneration.from_pretrained(place / "other", dtype="bfloat16")
        assert same_fingerprint(fingerprint(again, adapters=True), found["other"])

    def test_every_weight_counts(self, place):
        model = SugarForConditionalGeneration.from_pretrained(place / "full")
        found = fingerprint(model)
        for name, weight in model.named_parameters():
            before = weight.data.clone()
            weight.data += 0.05 * before.abs().mean() + 1e-3
            assert not same_fingerprint(fingerprint(model), found), name
            weight.data = before
        assert fingerprint(model) == found
        assert not same_fingerprint(found, "0123456789abcdef")


def without(*names):
    return lambda content: [content.pop(name) for name in list(content) if name.startswith(names)]


class TestDamage:
    @pytest.mark.parametrize(
        "file, change, message",
        [
            ("config.json", dict.clear, "no config.json of a model: it is missing or damaged"),
            ("config.json", without("vlm_config"), "no config.json of a model: it is missing or damaged"),
            ("model.safetensors", without("retrieval_projector"), "lacks weights: retrieval_projector.linear_1.bias"),
            ("model.safetensors", without("vlm.language_model.lm_head"), "lacks weights: vlm.lm_head.weight"),
        ],
    )
    def test_nothing_is_filled_in(self, place, tmp_path, file, change, message):
        with pytest.raises((OSError, ValueError), match=message):
            SugarForConditionalGeneration.from_pretrained(changed(place, "full", tmp_path, file, change))

    @pytest.mark.parametrize(
        "name, file, size, message",
        [
            ("full", "config.json", None, "no config.json of a model: it is missing or damaged"),
            ("full", "model.safetensors", 10000, "full/model.safetensors is damaged"),
            ("llava", "model.safetensors", 0, "llava/model.safetensors is damaged"),
            ("adapter", "adapter/adapter_model.safetensors", 1000, "adapter/adapter_model.safetensors is damaged"),
        ],
    )
    def test_the_file_is_named(self, place, tmp_path, name, file, size, message):
        copy = shutil.copytree(place / name, tmp_path / name)
        content = (copy / file).read_bytes()
        (copy / file).unlink()
        if size is not None:
            (copy / file).write_bytes(content[:size])
        with pytest.raises(OSError, match=message):
            SugarForConditionalGeneration.from_pretrained(copy)

    @pytest.mark.parametrize(
        "file, message",
        [
            ("processor_config.json", "lacks processor_config.json"),
            ("tokenizer.json", "tokenizer.json.* is missing or damaged"),
        ],
    )
    def test_of_a_processor(self, place, tmp_path, file, message):
        copy = shutil.copytree(place / "full", tmp_path / "full")
        (copy / file).unlink()
        with pytest.raises(OSError, match=message):
            SugarProcessor.from_pretrained(copy)
