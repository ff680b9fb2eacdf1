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

from hf_sugar import SugarConfig, SugarForConditionalGeneration, SugarProcessor, SugarTrainer, models
from hf_sugar.models.fingerprint_sugar import fingerprint, same_fingerprint


load = SugarForConditionalGeneration.from_pretrained
MODULES = sorted(Path(models.__file__).parent.glob("*_sugar.py"))
CODE = {file.name for file in MODULES}
MODEL_CLASSES = (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM)
TARGETS = dict(
    r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], exclude_modules=r"(?!vlm\.model\.language_model\.).*"
)
EVIL = "from pathlib import Path\nPath({marker!r}).touch()\n"
FIRST, SECOND = "1" * 40, "2" * 40  # commits


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A backbone, a full checkpoint of it, two adapters for it, and an image. For 4 bits every dimension is one of 64."""
    place = tmp_path_factory.mktemp("checkpoints")
    tiny.llava(hidden_size=64, vision_hidden_size=64).save_pretrained(place / "llava")
    tiny.processor().save_pretrained(place / "llava")
    processor = SugarProcessor.from_pretrained(place / "llava")
    load(place / "llava", dtype=torch.float32, retrieval_dim=16).save_pretrained(place / "full")
    for seed, name in enumerate(("adapter", "other")):
        trained(place / "llava", seed).get_base_model().save_pretrained(place / name)
    for name in ("full", "adapter", "other"):
        processor.save_pretrained(place / name)
    tiny.image(3).save(place / "photo.png")
    return place


@pytest.fixture(scope="module")
def inputs(place):
    return SugarProcessor.from_pretrained(place / "full").embed_inputs(items(place))


@pytest.fixture(scope="module")
def plain(inputs):
    return {key: value for key, value in inputs.items() if key != "slice_ids"}


def items(place):
    photo = {"type": "image", "image": str(place / "photo.png")}
    return ["a red circle", photo, [photo, "what is this?"]]


def trained(backbone, seed=0, **settings) -> PeftModel:
    """What comes out of a training with LoRA, but for the training."""
    settings = {"modules_to_save": ["retrieval_projector"], **TARGETS, **settings}
    if not isinstance(backbone, SugarForConditionalGeneration):
        backbone = load(backbone, dtype=torch.float32, retrieval_dim=16)
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


def read(file) -> dict:
    return json.loads(Path(file).read_text())


def changed(place, name, tmp_path, file, change) -> Path:
    """A copy of a checkpoint in which `change` was applied to the content of a safetensors or JSON file."""
    copy = shutil.copytree(place / name, tmp_path / name)
    value = read(copy / file) if file.endswith(".json") else load_file(copy / file)
    change(value)
    if file.endswith(".json"):
        (copy / file).write_text(json.dumps(value))
    else:
        save_file(value, copy / file, metadata={"format": "pt"})
    return copy


def hub_repository(cache: Path, repo_id: str, versions: dict[str, Path]) -> None:
    """What huggingface_hub leaves in its cache for these commits of a repository; the last one is `main`."""
    root = cache / f"models--{repo_id.replace('/', '--')}"
    for commit, directory in versions.items():
        shutil.copytree(directory, root / "snapshots" / commit)
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / "main").write_text(commit)


WITHOUT_THE_LIBRARY = """
import json, sys
cases, items, *hidden = map(json.loads, sys.argv[1:])
sys.modules |= dict.fromkeys(hidden)
import torch
torch.set_num_threads(1)
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

path, trust, result = cases[0][1], {"trust_remote_code": True}, {"errors": {}}
for auto in (AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor):
    try:
        auto.from_pretrained(path)
    except ValueError as error:
        result["errors"][auto.__name__] = str(error)
config = AutoConfig.from_pretrained(path, **trust)
processor = AutoProcessor.from_pretrained(path, **trust)
inputs = processor.embed_inputs(items)
plain = {key: value for key, value in inputs.items() if key != "slice_ids"}
with torch.no_grad():
    for name, where, settings in cases:
        if "quantization_config" in settings:
            settings["quantization_config"] = BitsAndBytesConfig(**settings["quantization_config"])
        auto = AutoModelForImageTextToText if name == "auto" else AutoModel
        model = auto.from_pretrained(where, **{"dtype": torch.float32, **settings}, **trust)
        assert model.retrieval_projector.linear_1.weight.dtype == torch.float32
        result[name] = model.embed(**inputs).tolist()
        result[f"{name} version"] = getattr(sys.modules[type(model).__module__], "VERSION", None)
        kinds = {type(module).__name__ for module in model.vlm.model.language_model.modules()}
        assert ("Linear4bit" in kinds) == (name == "4bit") and ("Linear8bitLt" in kinds) == (name == "8bit")
        text = model.vlm.model.language_model.config
        for found in (model.vlm.config.text_config, model.vlm.config.vision_config, text):
            assert found._attn_implementation == settings.get("attn_implementation", "sdpa")
        if name == "auto":
            assert type(model.config) is type(config) is type(model).config_class
            result["generated"] = model.generate(**plain, max_new_tokens=5).tolist()
            model.save_pretrained("copy")  # from the code that came with it
            processor.save_pretrained("copy")
            result["copy"] = AutoModel.from_pretrained("copy", **trust).embed(**inputs).tolist()
            if "peft" not in hidden:
                result["merged"] = model.merge_and_unload().embed(**inputs).tolist()
assert not any(name.startswith("hf_sugar.") for name in sys.modules)
json.dump(result, open("result.json", "w"))
"""


@pytest.mark.parametrize("name", ["full", "adapter"])
def test_without_the_library(place, inputs, plain, tmp_path, name):
    """Nothing but the weights is taken from the backbone's repository: its code is not run, though the flag is set."""
    path, hub = place / name, tmp_path / "hub"
    cases = [
        ("first", path, {}),
        ("auto", path, {"device_map": "cpu"}),
        ("eager", path, {"attn_implementation": "eager"}),
        ("bfloat16", path, {"dtype": "bfloat16"}),
    ]
    if name == "full":
        hidden = ["hf_sugar", "peft"]
        head = "retrieval_projector.linear_2.weight"
        for commit, sign in ((FIRST, 1), (SECOND, -1)):
            copy = changed(place, name, tmp_path / commit, "model.safetensors", lambda w, s=sign: w[head].mul_(s))
            with open(copy / "modeling_sugar.py", "a") as file:
                file.write(f"VERSION = {sign}\n")
        hub_repository(hub, "me/full", {commit: tmp_path / commit / name for commit in (FIRST, SECOND)})
        revisions = {"hub": {"revision": FIRST}, "main": {}, "code": {"revision": FIRST, "code_revision": SECOND}}
        cases += [(case, "me/full", {"cache_dir": str(hub), **settings}) for case, settings in revisions.items()]
    else:
        hidden = ["hf_sugar"]
        auto_map = {"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoModelForImageTextToText": "evil.M"}
        backbone = changed(place, "llava", tmp_path, "config.json", lambda c: c.update(auto_map=auto_map))
        (backbone / "evil.py").write_text(EVIL.format(marker=str(tmp_path / "ran")))
        zero = changed(
            place, "llava", tmp_path / "0", "model.safetensors", lambda w: [value.zero_() for value in w.values()]
        )
        hub_repository(hub, "me/llava", {FIRST: backbone, SECOND: zero})
        named = {"backbone_name_or_path": "me/llava", "backbone_revision": FIRST}
        hub_repository(
            hub, "me/it", {SECOND: changed(place, name, tmp_path, "config.json", lambda config: config.update(named))}
        )
        cases += [("hub", "me/it", {"cache_dir": str(hub)}), ("moved", path, {"backbone_name_or_path": str(backbone)})]
        for bits in ("8bit", "4bit"):
            cases.append((bits, path, {"quantization_config": {f"load_in_{bits}": True}}))
    arguments = [[[case, str(where), settings] for case, where, settings in cases], items(place), *hidden]
    (tmp_path / "elsewhere").mkdir()
    environment = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    run = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_THE_LIBRARY, *map(json.dumps, arguments)],
        cwd=tmp_path / "elsewhere",
        env={**environment, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,  # a question of transformers is answered by the end of the file
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    assert not any(word in run.stderr for word in ("Traceback", "MISSING"))
    assert not (tmp_path / "ran").exists()

    result = read(tmp_path / "elsewhere" / "result.json")
    errors = result.pop("errors")
    assert errors.keys() == {"AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor"}
    assert all("`trust_remote_code=True`" in message for message in errors.values())  # transformers' own
    model = load(path)
    assert result.pop("generated") == model.generate(**plain, max_new_tokens=5).tolist()
    versions = {case: result.pop(f"{case} version") for case, _, _ in cases}
    expected = embed(model, inputs)
    if name == "full":
        assert [versions[case] for case in ("hub", "main", "code")] == [1, -1, -1]
        torch.testing.assert_close(torch.tensor(result.pop("main")), -expected, atol=1e-6, rtol=0)
    for case in result.keys() & {"bfloat16", "8bit", "4bit"}:
        error = (torch.tensor(result.pop(case)) - expected).abs().max()
        assert 0 < error < (0.5 if case == "4bit" else 0.05)
    for case, embeddings in result.items():
        atol = 1e-5 if case in ("merged", "eager") else 1e-6
        torch.testing.assert_close(torch.tensor(embeddings), expected, atol=atol, rtol=0)


class TestFullCheckpoint:
    def test_files(self, place):
        processor = {"processor_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
        adapter = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
        assert contents(place / "full") == CODE | processor | {
            "config.json",
            "generation_config.json",
            "model.safetensors",
        }
        assert contents(place / "adapter") == CODE | processor | adapter | {"config.json"}
        config = read(place / "full" / "config.json")
        assert config["auto_map"].keys() == {"AutoConfig", *(auto.__name__ for auto in MODEL_CLASSES)}
        assert "auto_map" not in config["vlm_config"]
        config = read(place / "adapter" / "adapter" / "adapter_config.json")
        assert config["auto_mapping"] is None
        assert config["base_model_name_or_path"] == str(place / "llava")  # what the user gave

    @pytest.mark.parametrize("file", MODULES, ids=lambda file: file.name)
    def test_code_needs_only_transformers_and_what_that_needs(self, file):
        known = {"PIL", "huggingface_hub", "jinja2", "numpy", "safetensors", "torch", "transformers"}
        assert set(get_imports(file)) - set(sys.stdlib_module_names) <= known

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
            load(copy)


class TestAdapter:
    @pytest.mark.parametrize("name", ["adapter", "llava"])
    def test_no_report_of_a_projector_that_is_new_or_comes_later(self, place, capfd, name):
        logging.enable_propagation()
        try:
            model, info = AutoModel.from_pretrained(place / "adapter", output_loading_info=True)
            load(place / name)
        finally:
            logging.disable_propagation()
        assert not any(word in "".join(capfd.readouterr()) for word in ("MISSING", "retrieval_projector"))
        assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
        assert not info["unexpected_keys"] and not info["mismatched_keys"]

    def test_saved_again_it_is_an_adapter_again(self, place, inputs, tmp_path):
        model = load(place / "adapter")
        model.save_pretrained(tmp_path)
        assert contents(tmp_path) == contents(place / "adapter") - contents(place / "full") | {
            "config.json",
            *CODE - {"processing_sugar.py", "rows_sugar.py"},
        }
        assert read(tmp_path / "config.json") == read(place / "adapter" / "config.json")
        again = load(tmp_path)
        assert torch.equal(embed(again, inputs), embed(model, inputs))

    def test_several_are_switched_with_their_projectors(self, place, inputs, tmp_path):
        names = ("adapter", "other")
        alone = {n: embed(load(place / n), inputs) for n in names}
        model = load(place / "adapter")
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
        assert torch.equal(embed(load(tmp_path), inputs), alone["other"])
        with pytest.raises(ValueError, match="the name 'other' is attached"):
            model.load_sugar_adapter(place / "other", "other")
        for name in ("third", ["default", "other"]):
            with pytest.raises(ValueError, match="no adapter .*. Name one of these: default, other"):
                model.set_adapter(name)
        assert not any(parameter.requires_grad for parameter in model.parameters())

    def test_checkpoints_of_a_training(self, place, plain, tmp_path):
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
        first, second = (load(tmp_path / f"checkpoint-{step}") for step in (1, 2))
        assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
        with torch.no_grad():
            found, first, second = (model(**plain).logits for model in (trainer.model.eval(), first, second))
        assert torch.equal(found, first) and not torch.equal(first, second)
        assert AutoProcessor.from_pretrained(tmp_path / "checkpoint-1").chat_template

    def test_with_peft_itself(self, place, inputs):
        model = load(place / "llava", dtype=torch.float32, retrieval_dim=16)
        model = PeftModel.from_pretrained(model, place / "adapter" / "adapter")
        assert torch.equal(embed(model, inputs), embed(trained(place / "llava"), inputs))

    def test_exports_for_the_stock_class(self, place, plain, tmp_path):
        """`test_whatever_peft_trains` compares what they compute."""
        model = load(place / "adapter")
        processor = SugarProcessor.from_pretrained(place / "adapter")
        model.export_adapter(tmp_path / "adapter")
        assert contents(tmp_path / "adapter") == {"adapter_config.json", "adapter_model.safetensors"}
        # transformers finds the backbone by itself, if it does not ask for a later PEFT
        if version.parse(transformers.__version__) < version.parse("5.24"):
            stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "adapter")
            with torch.no_grad():
                assert torch.equal(stock(**plain).logits, model(**plain).logits)
        with pytest.raises(ValueError, match="no adapter to export"):
            load(place / "full").export_adapter(tmp_path)
        with pytest.raises(ValueError, match="`merge=True`"):
            model.export_backbone(tmp_path / "backbone")
        model.export_backbone(tmp_path / "backbone", merge=True, processor=processor)
        files = contents(tmp_path / "backbone")
        assert not files & CODE
        assert not any("auto_map" in (tmp_path / "backbone" / name).read_text() for name in files if "json" in name)
        found, expected = (load_file(path / "model.safetensors") for path in (tmp_path / "backbone", place / "llava"))
        assert found.keys() == expected.keys()
        stock = AutoProcessor.from_pretrained(tmp_path / "backbone")
        assert type(stock) is LlavaProcessor and stock.chat_template == processor.chat_template
        assert isinstance(processor, SugarProcessor)

    def test_the_commit_of_the_backbone_is_pinned(self, place, inputs, tmp_path):
        hub_repository(tmp_path / "hub", "me/llava", {SECOND: place / "llava"})
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
    def test_weights(self, place, inputs, tmp_path):
        model = load(place / "other")
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
                model.load_sugar_adapter(changed(place, "adapter", tmp_path / str(number), WEIGHTS, change), "wrong")
        assert torch.equal(embed(model, inputs), expected) and model.peft_config.keys() == {"default"}

    def test_without_a_head(self, place, tmp_path):
        trained(place / "llava", modules_to_save=None).get_base_model().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"retrieval_projector\.linear_1\.bias missing"):
            load(tmp_path)

    def test_another_backbone(self, place, tmp_path):
        tiny.llava().save_pretrained(tmp_path / "narrower")
        with pytest.raises(ValueError, match=r"narrower' lacks weights: .* \(384, 32\) instead of \(384, 64\)"):
            load(place / "adapter", backbone_name_or_path=str(tmp_path / "narrower"))
        model = load(tmp_path / "narrower", retrieval_dim=16)
        with pytest.raises(ValueError, match=r"does not fit this backbone: .* \(4, 64\) instead of \(4, 32\)"):
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

    def test_what_no_adapter_can_bring_is_refused(self, place, tmp_path):
        with pytest.raises(ValueError, match="`bias='all'` of the PEFT configuration changes the biases"):
            trained(place / "llava", bias="all").get_base_model().save_pretrained(tmp_path)
        assert not contents(tmp_path)

    def test_another_backbone_of_the_same_shapes(self, place, tmp_path):
        """Only one of its matrices is another one."""
        key = "language_model.model.layers.1.mlp.up_proj.weight"
        other = changed(place, "llava", tmp_path, "model.safetensors", lambda weights: weights[key].mul_(1.1))
        model = load(other, retrieval_dim=16)
        message = r"another backbone.*the weights are not.*trained on '.*llava'.*this is '.*llava'"
        with pytest.raises(ValueError, match=message):
            model.load_sugar_adapter(place / "adapter")
        assert not hasattr(model, "peft_config")

    @pytest.mark.parametrize("who", ["PEFT", "the model"])
    def test_a_merged_backbone_does_not_pass_for_the_one_it_was(self, place, inputs, tmp_path, who):
        if who == "PEFT":
            model = trained(place / "llava").merge_and_unload()
        else:
            model = load(place / "adapter").merge_and_unload()
        model.vlm.save_pretrained(tmp_path / "merged")
        model = trained(model)
        expected = embed(model, inputs)
        assert model.get_base_model().backbone_source() == ("", None)
        model.get_base_model().save_pretrained(tmp_path / "adapter")
        with pytest.raises(ValueError, match="another backbone"):
            load(tmp_path / "adapter", backbone_name_or_path=str(place / "llava"))
        again = load(tmp_path / "adapter", backbone_name_or_path=str(tmp_path / "merged"))
        torch.testing.assert_close(embed(again, inputs), expected, atol=1e-6, rtol=0)

    def test_backbone_that_lacks_weights(self, place, tmp_path):
        key = "language_model.lm_head.weight"
        broken = changed(place, "llava", tmp_path, "model.safetensors", lambda weights: weights.pop(key))
        with pytest.raises(ValueError, match=r"checkpoint '.*llava' lacks weights: vlm\.lm_head\.weight"):
            load(place / "adapter", backbone_name_or_path=str(broken))

    def test_other_pooling(self, place):
        model = load(place / "llava", retrieval_dim=16, image_pooling="last")
        with pytest.raises(ValueError, match="was trained with image_pooling='mean'; this model has 'last'"):
            model.load_sugar_adapter(place / "adapter")


class TestFingerprint:
    @pytest.mark.parametrize(
        "settings",
        [{"dtype": "bfloat16"}, {"dtype": "float16"}, {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}],
    )
    def test_precision_and_adapters_do_not_matter(self, place, settings):
        found = fingerprint(load(place / "llava").vlm)
        assert same_fingerprint(fingerprint(load(place / "llava", **settings).vlm), found)
        assert fingerprint(load(place / "adapter").vlm) == found

    def test_of_the_whole_model_everything_counts(self, place):
        model = load(place / "adapter")
        model.load_sugar_adapter(place / "other", "other")
        found = {"other": fingerprint(model, adapters=True)}
        model.set_adapter("default")
        found["default"] = fingerprint(model, adapters=True)
        model.disable_adapters()
        found["none"] = fingerprint(model, adapters=True)
        assert not any(same_fingerprint(a, b) for a, b in combinations(found.values(), 2))
        again = load(place / "other", dtype="bfloat16")
        assert same_fingerprint(fingerprint(again, adapters=True), found["other"])

    def test_every_weight_counts(self, place):
        model = load(place / "full")
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
            load(changed(place, "full", tmp_path, file, change))

    @pytest.mark.parametrize(
        "name, file, size, message",
        [
            ("full", "config.json", None, "no config.json of a model: it is missing or damaged"),
            ("full", "model.safetensors", 10000, "full/model.safetensors is damaged"),
            ("llava", "model.safetensors", 0, "llava/model.safetensors is damaged"),
            ("adapter", "adapter/adapter_model.safetensors", 1000, "adapter/adapter_model.safetensors is damaged"),
            ("full", "processor_config.json", None, "lacks processor_config.json"),
            ("full", "tokenizer.json", None, "tokenizer.json.* is missing or damaged"),
        ],
    )
    def test_the_file_is_named(self, place, tmp_path, name, file, size, message):
        copy = shutil.copytree(place / name, tmp_path / name)
        content = (copy / file).read_bytes()
        (copy / file).unlink()
        if size is not None:
            (copy / file).write_bytes(content[:size])
        of_processor = file.startswith(("processor", "tokenizer"))
        with pytest.raises(OSError, match=message):
            (SugarProcessor.from_pretrained if of_processor else load)(copy)
