"""Checkpoints with the code in them: without this library, with it, and damaged."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from saved_checkpoints import CODE, MODULES, changed, contents, embed, hub_repository, items, load, read
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    LlavaProcessor,
)
from transformers.dynamic_module_utils import get_imports

from hf_sugar import SugarConfig, SugarForConditionalGeneration, SugarProcessor


MODEL_CLASSES = (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM)
EVIL = "from pathlib import Path\nPath({marker!r}).touch()\n"
FIRST, SECOND = "1" * 40, "2" * 40  # commits


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
            asked = settings.get("attn_implementation", "sdpa")
            assert found._attn_implementation in (asked, f"{asked}_rows")  # once it has embedded
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
def test_without_the_library(saved, inputs, plain, tmp_path, name):
    """Nothing but the weights is taken from the backbone's repository: its code is not run, though the flag is set."""
    path, hub = saved / name, tmp_path / "hub"
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
            copy = changed(saved, name, tmp_path / commit, "model.safetensors", lambda w, s=sign: w[head].mul_(s))
            with open(copy / "modeling_sugar.py", "a") as file:
                file.write(f"VERSION = {sign}\n")
        hub_repository(hub, "me/full", {commit: tmp_path / commit / name for commit in (FIRST, SECOND)})
        revisions = {"hub": {"revision": FIRST}, "main": {}, "code": {"revision": FIRST, "code_revision": SECOND}}
        cases += [(case, "me/full", {"cache_dir": str(hub), **settings}) for case, settings in revisions.items()]
    else:
        hidden = ["hf_sugar"]
        auto_map = {"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoModelForImageTextToText": "evil.M"}
        backbone = changed(saved, "llava", tmp_path, "config.json", lambda c: c.update(auto_map=auto_map))
        (backbone / "evil.py").write_text(EVIL.format(marker=str(tmp_path / "ran")))
        zero = changed(
            saved, "llava", tmp_path / "0", "model.safetensors", lambda w: [value.zero_() for value in w.values()]
        )
        hub_repository(hub, "me/llava", {FIRST: backbone, SECOND: zero})
        named = {"backbone_name_or_path": "me/llava", "backbone_revision": FIRST}
        hub_repository(
            hub, "me/it", {SECOND: changed(saved, name, tmp_path, "config.json", lambda config: config.update(named))}
        )
        cases += [("hub", "me/it", {"cache_dir": str(hub)}), ("moved", path, {"backbone_name_or_path": str(backbone)})]
        for bits in ("8bit", "4bit"):
            cases.append((bits, path, {"quantization_config": {f"load_in_{bits}": True}}))
    arguments = [[[case, str(where), settings] for case, where, settings in cases], items(saved), *hidden]
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
    def test_files(self, saved):
        processor = {"processor_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
        adapter = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
        assert contents(saved / "full") == CODE | processor | {
            "config.json",
            "generation_config.json",
            "model.safetensors",
        }
        assert contents(saved / "adapter") == CODE | processor | adapter | {"config.json"}
        config = read(saved / "full" / "config.json")
        assert config["auto_map"].keys() == {"AutoConfig", *(auto.__name__ for auto in MODEL_CLASSES)}
        assert "auto_map" not in config["vlm_config"]
        config = read(saved / "adapter" / "adapter" / "adapter_config.json")
        assert config["auto_mapping"] is None
        assert config["base_model_name_or_path"] == str(saved / "llava")  # what the user gave

    @pytest.mark.parametrize("file", MODULES, ids=lambda file: file.name)
    def test_code_needs_only_transformers_and_what_that_needs(self, file):
        known = {"PIL", "huggingface_hub", "jinja2", "numpy", "safetensors", "torch", "transformers"}
        assert set(get_imports(file)) - set(sys.stdlib_module_names) <= known

    def test_with_the_library_no_flag_and_no_code_of_the_repository(self, saved, inputs, tmp_path, monkeypatch):
        """Nor a question on standard input. With the flag, the installed code is the one that runs."""
        monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
        copy = shutil.copytree(saved / "full", tmp_path / "full")
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
                assert torch.equal(processor.embed_inputs(items(saved))["input_ids"], inputs["input_ids"])
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize(
        "name, file", [("full", "model"), ("llava", "model"), ("adapter", "adapter/adapter_model")]
    )
    def test_pickles_are_not_loaded(self, saved, tmp_path, name, file):
        copy = shutil.copytree(saved / name, tmp_path / name)
        weights = copy / f"{file}.safetensors"
        torch.save(load_file(weights), weights.with_name(f"{'pytorch_' * (name != 'adapter')}{Path(file).name}.bin"))
        weights.unlink()
        with pytest.raises(OSError, match=f"{Path(file).name}.safetensors"):
            load(copy)


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
    def test_nothing_is_filled_in(self, saved, tmp_path, file, change, message):
        with pytest.raises((OSError, ValueError), match=message):
            load(changed(saved, "full", tmp_path, file, change))

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
    def test_the_file_is_named(self, saved, tmp_path, name, file, size, message):
        copy = shutil.copytree(saved / name, tmp_path / name)
        content = (copy / file).read_bytes()
        (copy / file).unlink()
        if size is not None:
            (copy / file).write_bytes(content[:size])
        of_processor = file.startswith(("processor", "tokenizer"))
        with pytest.raises(OSError, match=message):
            (SugarProcessor.from_pretrained if of_processor else load)(copy)
