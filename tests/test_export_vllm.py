"""What vLLM makes of an export, by its own source: the wheel is opened as an archive, and nothing of it is installed."""

import __future__

import abc
import ast
import importlib.util
import json
import sys
import types
import zipfile
from collections import deque
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from unittest.mock import MagicMock

import jinja2.nodes
import numpy as np
import pytest
import tiny
import torch

from hf_sugar.export import export_sentence_transformers
from hf_sugar.models import SugarForConditionalGeneration, SugarProcessor


ROOT = Path(__file__).parent.parent
WHEELS = sorted((ROOT / ".cache").glob("vllm-0.33.0-*.whl"))
REASON = "no wheel of vLLM: pip download --no-deps -d .cache vllm==0.33.0"
pytestmark = [pytest.mark.extras, pytest.mark.skipif(not WHEELS, reason=REASON)]
PLUGIN = ROOT / "examples" / "vllm" / "sugar_vllm" / "model.py"
MODELS = "vllm/model_executor/models"
POOLER = "vllm/model_executor/layers/pooler"
FORMAT = (
    "_is_var_access _is_attr_access _is_var_or_elems_access _attr_dotted_name _iter_nodes_assign_var_or_elems "
    "_iter_nodes_assign_messages_item _iter_nodes_assign_content_item _try_extract_ast _detect_content_format"
)


def tree(file: str) -> ast.Module:
    with zipfile.ZipFile(WHEELS[0]) as wheel:
        return ast.parse(wheel.read(file))


def names(module: ast.Module) -> set[str]:
    """What a module defines, imports by name or assigns at its top level."""
    found = set()
    for node in module.body:
        found |= {alias.asname or alias.name for alias in getattr(node, "names", [])}
        found |= {target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)}
        found |= {node.name} if hasattr(node, "name") else set()
    return found


@pytest.fixture(scope="module")
def vllm():
    """Functions and classes of vLLM as they stand in its files, with what they need of the rest put in their place."""

    def read_json(name, model, revision=None):
        return json.loads((Path(model) / name).read_text())

    def load_weight(parameter, weight):
        assert parameter.shape == weight.shape
        parameter.data.copy_(weight)

    loader = types.SimpleNamespace(default_weight_loader=load_weight)
    pooling = {"SEQ_POOLING_TYPES": ("CLS", "LAST", "MEAN"), "TOK_POOLING_TYPES": ("ALL", "STEP")}
    modules = {"model_executor.model_loader.weight_utils": loader, "config.pooler": types.SimpleNamespace(**pooling)}
    sys.modules.update({f"vllm.{name}": module for name, module in modules.items()})
    space = {"torch": torch, "nn": torch.nn, "np": np, "PIN_MEMORY": False, "logger": MagicMock(), "Path": Path}
    space |= {"dataclass": dataclass, "abstractmethod": abc.abstractmethod, "ABC": abc.ABC}
    space |= {"cache": lambda function: function, "file_or_path_exists": lambda **kwargs: True}
    space |= {"get_hf_file_to_dict": read_json, "_ACTIVATION_REGISTRY": {"gelu": torch.nn.GELU()}}
    space |= {"jinja2": jinja2, "deque": deque, "lru_cache": lru_cache}
    space["get_hf_file_bytes"] = lambda name, model, revision: (Path(model) / name).read_bytes()
    for file, wanted in (
        ("vllm/transformers_utils/config.py", "get_pooling_config parse_pooling_type try_get_dense_modules"),
        ("vllm/model_executor/layers/activation.py", "get_act_fn"),
        (f"{MODELS}/adapters.py", "_load_st_projector _load_dense_weights"),
        (f"{POOLER}/common.py", "PoolingParamsUpdate"),
        (f"{POOLER}/seqwise/methods.py", "SequencePoolingMethod LastPool"),
        (f"{POOLER}/seqwise/heads.py", "SequencePoolerHead EmbeddingPoolerHead"),
        ("vllm/v1/pool/metadata.py", "PoolingCursor PoolingStates PoolingMetadata"),
        ("vllm/renderers/hf.py", FORMAT),
    ):
        module = tree(file)
        constants = [node for node in module.body if isinstance(node, ast.Assign) and "_TYPES" in ast.unparse(node)]
        found = [node for node in module.body if getattr(node, "name", None) in wanted.split()]
        assert len(found) == len(wanted.split())
        code = compile(ast.Module([*constants, *found], []), file, "exec", flags=__future__.annotations.compiler_flag)
        exec(code, space)
    yield types.SimpleNamespace(**space)
    for name in modules:
        del sys.modules[f"vllm.{name}"]


@pytest.fixture(scope="module")
def slice_pool(vllm):
    """The plugin's pooling, on vLLM's own base class."""
    module = MagicMock(PoolingParamsUpdate=vllm.PoolingParamsUpdate, SequencePoolingMethod=vllm.SequencePoolingMethod)
    module.as_embedding_model = lambda model: torch.nn.Module
    imports = [node.module for node in ast.parse(PLUGIN.read_text()).body if isinstance(node, ast.ImportFrom)]
    imports = {name: module for name in imports if name.startswith("vllm")}
    spec = importlib.util.spec_from_file_location("sugar_vllm_model", PLUGIN)
    plugin = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for name in imports:
            patch.setitem(sys.modules, name, module)
        spec.loader.exec_module(plugin)
    return plugin.SlicePool


@pytest.fixture(scope="module", params=["last", "mean"])
def exported(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    model = SugarForConditionalGeneration.from_vlm(tiny.llava(), retrieval_dim=16, image_pooling=request.param)
    processor = SugarProcessor.from_processor(tiny.processor())
    assert export_sentence_transformers(model, processor, directory) == (request.param == "last")
    return model, processor, directory


def test_module_names_and_pooling(exported, vllm):
    model, _, directory = exported
    kinds = [module["type"] for module in json.loads((directory / "modules.json").read_text())]
    sets = [vllm._ST_POOLING_MODULE_TYPES, vllm._DENSE_MODULE_TYPES, vllm._DENSE_MODULE_TYPES]
    for kind, known in zip(kinds[1:], [*sets, vllm._ST_NORMALIZE_MODULE_TYPES], strict=True):
        assert kind in known
    assert (kinds[0] in vllm._ST_TRANSFORMER_MODULE_TYPES) == (model.config.image_pooling == "last")
    pooling = "LAST" if model.config.image_pooling == "last" else "MEAN"  # MEAN switches chunked prefill off
    assert vllm.get_pooling_config(directory) == {"use_activation": True, "seq_pooling_type": pooling}


def test_parts_stay_in_their_order(exported, vllm):
    """Where vLLM takes a template for one of plain texts, it would put all images first."""
    template = (exported[2] / "chat_template.jinja").read_text()
    assert vllm._detect_content_format(template, default="string") == "openai"


def test_architecture(exported):
    """vLLM knows the one of stock pooling; the other is the plugin's alone."""
    [architecture] = json.loads((exported[2] / "config.json").read_text())["architectures"]
    known = any(
        isinstance(n, ast.Constant) and n.value == architecture for n in ast.walk(tree(f"{MODELS}/registry.py"))
    )
    assert known == (exported[0].config.image_pooling == "last")
    registered = (PLUGIN.parent / "__init__.py").read_text()
    assert known or f'"{architecture}"' in registered and architecture in names(ast.parse(PLUGIN.read_text()))


def test_the_same_embeddings(exported, vllm, slice_pool):
    """The prompts that a server would make of messages, vLLM's projector and normalisation, and its pooling or the plugin's."""
    model, processor, directory = exported
    images = [tiny.image(1), tiny.image(2, 40, 60)]
    items = ["a red circle", images[0], ["what?", images[1]], [images[0], "A star."], [images[0], images[1]]]
    stored = SugarProcessor.from_pretrained(directory).to_backbone()
    states, prompts = [], []
    for item in items:
        parts = item if isinstance(item, list) else [item]
        content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]
        text = stored.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        shown = [part for part in parts if not isinstance(part, str)]
        inputs = stored(text=text, images=shown or None, add_special_tokens=False, return_tensors="pt")
        prompts.append(inputs["input_ids"][0])
        with torch.no_grad():
            states.append(model.base_model(**inputs)[0][0])

    lengths = torch.tensor([len(prompt) for prompt in prompts])
    params = [types.SimpleNamespace(task="embed", dimensions=None, use_activation=True) for _ in items]
    padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    metadata = vllm.PoolingMetadata(lengths, None, padded, params, [vllm.PoolingStates() for _ in items])
    metadata.build_pooling_cursor(lengths.numpy(), lengths, torch.device("cpu"))
    pool = slice_pool(tiny.llava().config.image_token_id)
    assert pool.get_pooling_updates("embed").requires_token_ids
    if model.config.image_pooling == "last":
        pool = vllm.LastPool()
    settings = types.SimpleNamespace(model=directory, revision=None, head_dtype=torch.float32)
    head = vllm.EmbeddingPoolerHead(
        vllm._load_st_projector(settings), torch.float32, lambda x: torch.nn.functional.normalize(x, dim=-1)
    )
    with torch.no_grad():
        found = head(pool(torch.cat(states), metadata), metadata)
        expected = torch.cat([model.embed(**processor.embed_inputs([item])) for item in items])
    assert torch.pdist(expected).min() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_what_the_plugin_imports_is_there():
    for node in ast.parse(PLUGIN.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module.startswith("vllm"):
            path = node.module.replace(".", "/")
            with zipfile.ZipFile(WHEELS[0]) as wheel:
                file = f"{path}.py" if f"{path}.py" in wheel.namelist() else f"{path}/__init__.py"
            there = names(tree(file))
            if "*" in there:
                there |= {
                    name for part in ("abstract", "common", "special") for name in names(tree(f"{path}/{part}.py"))
                }
            assert {alias.name for alias in node.names} <= there, node.module
    methods = {node.name for node in ast.walk(tree(f"{MODELS}/adapters.py")) if isinstance(node, ast.FunctionDef)}
    assert {"_init_pooler", "as_embedding_model"} <= methods
