"""The model card of a checkpoint, written from what the run left in its directory."""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, metadata_load
from huggingface_hub.errors import RepositoryNotFoundError

from ..data.files import readable
from ..evaluation.metrics import Estimate
from ..evaluation.report import environment, report_table
from ..files import replacing


if TYPE_CHECKING:
    from ..training import SugarTrainer

TEMPLATE = Path(__file__).with_name("model_card.md")
RUN_FILE = "sugar_run.json"
GENERATED = "<!-- Written by hf_sugar."
# what is in the cards that transformers, PEFT and TRL write by themselves
FOREIGN = ("[More Information Needed]", "It has been trained using [TRL]")
CITATION = """\
@inproceedings{chow2024unified,
    title     = {Unified Generative and Discriminative Training for Multi-modal Large Language Models},
    author    = {Wei Chow and Juncheng Li and Qifan Yu and Kaihang Pan and Hao Fei and Zhiqi Ge and Shuai Yang and Siliang Tang and Hanwang Zhang and Qianru Sun},
    booktitle = {Advances in Neural Information Processing Systems},
    year      = 2024,
}"""

# of a run, what is told to anyone
STRUCTURE_SETTINGS = (
    "discriminative_loss contrastive_weight contrastive_temperature contrastive_mask_above singles_per_sample "
    "label_calibration matrix_batch_size delta positions_per_sample label_kernel label_normalization structure_reduction "
    "gather_across_devices flip_captions matryoshka_dims"
).split()
SETTINGS = (
    f"structure_weight {' '.join(STRUCTURE_SETTINGS)} learning_rate lr_scheduler_type warmup_steps optim weight_decay "
    "num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps train_sampling_strategy max_length "
    "max_batch_tokens padding_free freeze_vision_tower bf16 fp16 seed"
).split()
LICENSE_FIELDS = ("license", "license_name", "license_link")
PEFT_SETTINGS = "peft_type r lora_alpha lora_dropout target_modules use_dora use_rslora".split()


def read_json(file: Path) -> dict[str, Any]:
    """Content of a JSON file, empty if there is none."""
    with readable(str(file)):
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def is_hub_id(name_or_path: str) -> bool:
    """Whether this names a repository of the Hub, and not something on this machine."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name_or_path) is not None and not Path(name_or_path).exists()


def public_name(name_or_path: str) -> str:
    """A Hub id as it is; of a local path the last component alone, because the rest of it is nobody's business."""
    return name_or_path if is_hub_id(name_or_path) else Path(name_or_path).name


def stated_license(name_or_path: str, api: HfApi | None = None) -> dict[str, Any]:
    """`license`, `license_name` and `license_link` as the card of a directory or (with `api`) of a Hub id states them."""
    data: Any = {}
    card = Path(name_or_path) / "README.md"
    if card.is_file():
        data = metadata_load(card) or {}
    elif api is not None and is_hub_id(name_or_path):
        with suppress(RepositoryNotFoundError):
            data = api.model_info(name_or_path).card_data or {}
    return {key: data[key] for key in LICENSE_FIELDS if data.get(key)}


def _license_name(stated: dict[str, Any]) -> str | None:
    name = stated.get("license_name") or stated.get("license")
    return ", ".join(name) if isinstance(name, list) else name


def dataset_names(dataset: Any) -> list[str]:
    """Hub ids and file names that `datasets` recorded of where a dataset came from."""
    names = []
    for source in dataset.info.download_checksums or {}:
        hub = re.match(r"hf://datasets/([\w.-]+/[\w.-]+?)@", source)
        names.append(hub.group(1) if hub else Path(source).name)
    return list(dict.fromkeys(names))


def run_facts(trainer: "SugarTrainer") -> dict[str, Any]:
    """What the card says of a training run, for `json.dump`. It can be shown to anyone."""
    settings = trainer.args.to_dict()
    unused = {"num_train_epochs" if trainer.args.max_steps > 0 else "max_steps"}
    if not trainer.args.structure_weight:
        unused |= set(STRUCTURE_SETTINGS)
    model = trainer.accelerator.unwrap_model(trainer.model)
    lora = None
    if hasattr(model, "peft_config"):
        peft = model.peft_config[model.active_adapter].to_dict()
        lora = {key: peft[key] for key in PEFT_SETTINGS if peft.get(key)}
        if isinstance(lora.get("target_modules"), set | list):
            lora["target_modules"] = " ".join(sorted(lora["target_modules"]))
    quantization = None
    if hasattr(model.config, "quantization_config"):
        fields = model.config.to_dict()["quantization_config"]
        names = [key for key in fields if key.startswith(("load_in", "bnb_4bit")) and fields[key]]
        quantization = ", ".join([str(fields["quant_method"]), *(f"{key} {fields[key]}" for key in names)])
    base = model.config.name_or_path
    return {
        "base_model": public_name(base) if base else None,
        "base_model_revision": getattr(model.config, "_commit_hash", None),
        "base_model_license": stated_license(base) if base else {},
        "datasets": list(dict.fromkeys(public_name(name) for name in trainer.dataset_names)),
        "rows": len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else None,
        "teachers": {
            role: {"name": public_name(path), "license": _license_name(stated_license(path))}
            for role, path in trainer.teachers.items()
        },
        "lora": lora,
        "quantization": quantization,
        "steps": trainer.state.global_step,
        "processes": trainer.accelerator.num_processes,
        "settings": {name: settings[name] for name in SETTINGS if name not in unused and settings[name] is not None},
        "environment": environment(),
    }


def is_foreign(directory: Path) -> bool:
    """Whether the card of a directory is one that transformers, PEFT or TRL wrote by themselves."""
    text = (directory / "README.md").read_text(encoding="utf-8")
    return any(mark in text for mark in FOREIGN)


def writes_card(directory: Path) -> bool:
    """Whether the card of a directory is ours to write: nobody wrote one by hand."""
    card = directory / "README.md"
    return not card.is_file() or GENERATED in card.read_text(encoding="utf-8") or is_foreign(directory)


def model_card(
    directory: str | Path,
    repo_id: str | None = None,
    *,
    base_model: str | None = None,
    license: str | None = None,
    tags: list[str] | None = None,
    api: HfApi | None = None,
) -> ModelCard:
    """
    Model card of a Sugar checkpoint, from its configuration, the facts that [`SugarTrainer`] left with it, and the
    `report.json` of `hf-sugar train` or `hf-sugar evaluate` if there is one in the directory.

    Args:
        directory (`str` or `Path`): full checkpoint or adapter directory.
        repo_id (`str`, *optional*): where it is going to be on the Hub. Defaults to the name of the directory.
        base_model (`str`, *optional*):
            Hub id of the model that the training started from. Defaults to what the run recorded.
        license (`str`, *optional*): licence of this model. Defaults to what the base model states, if it does.
        tags (`list[str]`, *optional*): further tags.
        api ([`~huggingface_hub.HfApi`], *optional*): asks the Hub for licences. Without it nobody is asked.
    """
    directory = Path(directory)
    repo_id = repo_id or directory.absolute().name
    config, run, report = (read_json(directory / name) for name in ("config.json", RUN_FILE, "report.json"))
    adapter = config.get("backbone_name_or_path") is not None

    base = base_model or run.get("base_model") or config.get("backbone_name_or_path")
    base_license = run.get("base_model_license") or {}
    if base is not None and (is_hub_id(base) or not run):
        base_license = base_license or stated_license(base, api)
    base = base and public_name(base)
    for teacher in run.get("teachers", {}).values():
        if teacher["license"] is None and is_hub_id(teacher["name"]):
            teacher["license"] = _license_name(stated_license(teacher["name"], api))
    datasets = [name for name in run.get("datasets", []) if is_hub_id(name)]
    name = repo_id.split("/")[-1]
    eval_results = _eval_results(report) or None
    on_hub = base is not None and is_hub_id(base)
    data = ModelCardData(
        # the Hub's own snippet is then `AutoModel...from_pretrained(..., trust_remote_code=True)`, which is right for
        # adapters too: the configuration and the code are in the root, the LoRA weights below it
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        **({"license": license} if license else base_license),
        base_model=base if on_hub else None,
        base_model_relation=("adapter" if adapter else "finetune") if on_hub else None,
        datasets=datasets or None,
        tags=["hf_sugar", "sugar", "multimodal-retrieval", "trl", *(["lora"] if adapter else []), *(tags or [])],
        model_name=name if eval_results else None,
        eval_results=eval_results,
    )
    runs = report.get("runs", {})
    for results in runs.values():
        results |= {metric: Estimate(**value) for metric, value in results.items() if isinstance(value, dict)}
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        repo_id=repo_id,
        adapter=adapter,
        base=f"[{base}](https://huggingface.co/{base})" if on_hub else base,
        base_license=_license_name(base_license),
        run=run,
        config=config,
        table=report_table(runs) if runs else None,
        command=_evaluation_command(repo_id, report.get("settings", {})),
        citation=CITATION,
    )


def write_card(directory: str | Path, facts: dict[str, Any], **kwargs: Any) -> None:
    """Leave the facts of a run (see [`run_facts`]) in a checkpoint directory, and a card made of them (`kwargs` as in
    [`model_card`]) unless somebody wrote one by hand."""
    directory = Path(directory)
    with replacing(directory / RUN_FILE) as file:
        file.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if writes_card(directory):
        card = model_card(directory, **kwargs)
        with replacing(directory / "README.md") as file:
            file.write_text(str(card), encoding="utf-8")


def _public_sources(value: Any) -> Any:
    """Sources of evaluation data without the folders that they are in."""
    if isinstance(value, dict):
        return {key: _public_sources(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_public_sources(item) for item in value]
    return public_name(value) if isinstance(value, str) else value


def _evaluation_command(repo_id: str, settings: dict[str, Any]) -> str:
    data = {key: _public_sources(value) for key, value in settings.items() if key.endswith("_data") and value}
    others = [key for key in ("split", "truncate_dim", "max_new_tokens", "untrained") if settings.get(key)]
    data = (data or {"image_text_data": "test.json"}) | {key: settings[key] for key in others}
    text = yaml.safe_dump(data, sort_keys=False)
    command = f"hf-sugar evaluate --config evaluate.yaml --model_name_or_path {repo_id}"
    return f"cat > evaluate.yaml <<END\n{text}END\n{command}"


def _eval_results(report: dict[str, Any]) -> list[EvalResult]:
    """The figures of the last run of a report, in the form of the Hub."""
    results, settings = [], report.get("settings", {})
    *_, run = {}, *report.get("runs", {}).values()
    for name, value in run.items():
        if not isinstance(value, dict):
            continue
        source, _, metric = name.rpartition("/")
        task, field = "retrieval", "image_text_data" if "_to_" in metric else "interleaved_data"
        if metric == "exact_match":
            task, field = "image-text-to-text", "generation_data"
        elif metric.endswith("_score"):
            task, field = "winoground", "winoground_data"
        data = settings.get(field)
        data = data.get(source, data.get("path")) if isinstance(data, dict) else data
        data = _public_sources(data[0] if isinstance(data, list) and len(data) == 1 else data)
        dataset = data if isinstance(data, str) else source or "not named"
        measured = {"metric_name": f"{metric} (percent)", "metric_value": round(value["value"], 2)}
        split = settings.get("split")
        results.append(EvalResult(task, dataset, dataset, metric_type=metric, dataset_split=split, **measured))
    return results
