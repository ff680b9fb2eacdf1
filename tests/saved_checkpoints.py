"""Saved checkpoints: made, changed, and compared."""

import json
import shutil
from pathlib import Path

import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from hf_sugar import SugarForConditionalGeneration, SugarProcessor, models


load = SugarForConditionalGeneration.from_pretrained
MODULES = sorted(Path(models.__file__).parent.glob("*_sugar.py"))
CODE = {file.name for file in MODULES}
TARGETS = dict(
    r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], exclude_modules=r"(?!vlm\.model\.language_model\.).*"
)


def save_all(path: Path) -> Path:
    """A backbone, a full checkpoint of it, two adapters for it, and an image. For 4 bits every dimension is one of 64."""
    tiny.llava(hidden_size=64, vision_hidden_size=64).save_pretrained(path / "llava")
    tiny.processor().save_pretrained(path / "llava")
    processor = SugarProcessor.from_pretrained(path / "llava")
    load(path / "llava", dtype=torch.float32, retrieval_dim=16).save_pretrained(path / "full")
    for seed, name in enumerate(("adapter", "other")):
        trained(path / "llava", seed).get_base_model().save_pretrained(path / name)
    for name in ("full", "adapter", "other"):
        processor.save_pretrained(path / name)
    tiny.image(3).save(path / "photo.png")
    return path


def items(saved):
    photo = {"type": "image", "image": str(saved / "photo.png")}
    return ["a red circle", photo, [photo, "what is this?"]]


def trained(backbone, seed=0, **settings) -> PeftModel:
    """What comes out of a training with LoRA, but for the training."""
    settings = {"modules_to_save": ["retrieval_projector"], **TARGETS, **settings}
    if not isinstance(backbone, SugarForConditionalGeneration):
        backbone = load(backbone, dtype=torch.float32, retrieval_dim=16)
    backbone.config.random_projector = False
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


def changed(saved, name, tmp_path, file, change) -> Path:
    """A copy of a checkpoint in which `change` was applied to the content of a safetensors or JSON file."""
    copy = shutil.copytree(saved / name, tmp_path / name)
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
