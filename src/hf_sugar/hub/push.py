"""Publishing a checkpoint directory: what goes to the Hub, and what stays on this machine."""

import json
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi

from .. import __version__
from ..models.adapter_sugar import ADAPTER_SUBFOLDER
from .card import RUN_FILE, is_foreign, is_hub_id, model_card, public_name, read_json, writes_card


# Named one by one, so that nothing else in a training directory is ever published: optimizer states, `training_args.bin`
# (a pickle, with paths and tokens), logs, teacher caches, data.
FILES = (
    "config.json generation_config.json *.safetensors *.safetensors.index.json processor_config.json "
    "*preprocessor_config.json chat_template.* additional_chat_templates/*.jinja tokenizer*.json tokenizer.model "
    f"special_tokens_map.json added_tokens.json vocab.json merges.txt *_sugar.py README.md LICENSE* {RUN_FILE} "
    f"{ADAPTER_SUBFOLDER}/adapter_config.json {ADAPTER_SUBFOLDER}/*.safetensors"
).split()


def checkpoint_files(directory: str | Path) -> list[Path]:
    """The files of a full checkpoint or adapter directory that are published, relative to it; refuses an incomplete one."""
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory: name the directory of a Sugar checkpoint.")
    config = read_json(directory / "config.json")
    if config.get("model_type") != "sugar":
        found = f"holds a plain {config['model_type']!r} model" if "model_type" in config else "has no config.json"
        raise ValueError(f"{directory} is not a Sugar checkpoint: it {found}. `SugarTrainer.save_model` writes one.")
    needed = {"processor_config.json"}
    if config.get("backbone_name_or_path") is not None:
        needed |= {f"{ADAPTER_SUBFOLDER}/{name}" for name in ("adapter_config.json", "adapter_model.safetensors")}
    else:
        index = read_json(directory / "model.safetensors.index.json")
        needed |= set(index.get("weight_map", {"": "model.safetensors"}).values())
    files = {file.relative_to(directory) for pattern in FILES for file in directory.glob(pattern) if file.is_file()}
    if missing := needed - {file.as_posix() for file in files}:
        raise ValueError(f"{directory} lacks {', '.join(sorted(missing))}: save the model and its processor there.")
    return sorted(files)


def public_configs(directory: str | Path, api: HfApi, base_model: str | None = None) -> dict[str, bytes]:
    """Of an adapter the configuration files, by path, with `base_model` in them if it is given; refuses one of a local
    backbone without it."""
    config = read_json(Path(directory, "config.json"))
    backbone = config.get("backbone_name_or_path")
    if base_model is None and backbone is not None and not is_hub_id(backbone):
        whose = f"The adapter in {directory} was trained on the local directory {public_name(backbone)!r}"
        remedy = (
            "Push that backbone and name it (`--base_model me/backbone`, `base_model=`), or merge it and push all."
        )
        raise ValueError(f"{whose}, which nobody else has. {remedy}")
    if base_model is None or backbone is None:
        return {}
    name = f"{ADAPTER_SUBFOLDER}/adapter_config.json"
    adapter, commit = read_json(Path(directory, name)), api.model_info(base_model).sha
    config |= {"backbone_name_or_path": base_model, "backbone_revision": commit}
    adapter |= {"base_model_name_or_path": base_model, "revision": commit}
    contents = {"config.json": config, name: adapter}
    return {path: (json.dumps(content, indent=2) + "\n").encode() for path, content in contents.items()}


def push_checkpoint(
    directory: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    base_model: str | None = None,
    license: str | None = None,
    tags: list[str] | None = None,
    commit_message: str = "Upload Sugar model with hf_sugar",
    token: str | None = None,
    blocking: bool = True,
) -> CommitInfo:
    """
    Publish a checkpoint directory in one commit: weights, configuration, processor, code and model card, and nothing
    else that is in the directory. A card is written unless somebody wrote one by hand.

    Args:
        directory (`str` or `Path`): full checkpoint or adapter directory.
        repo_id (`str`): where to. The repository is made if it is not there.
        private (`bool`, *optional*):
            Whether a new repository is private. Defaults to the setting of the account or organisation.
        revision (`str`, *optional*): branch to commit to, made if it is not there. Defaults to `"main"`.
        create_pr (`bool`, *optional*, defaults to `False`): whether to open a pull request instead.
        base_model (`str`, *optional*):
            Hub id of the model that the training started from. Needed for an adapter of a local backbone.
        license, tags: as of [`model_card`].
        commit_message (`str`, *optional*): title of the commit.
        token (`str`, *optional*): access token. Defaults to the one of `hf auth login` or `HF_TOKEN`.
        blocking (`bool`, *optional*, defaults to `True`): whether to wait for the upload.

    Returns:
        [`~huggingface_hub.CommitInfo`], or a `Future` of it if `blocking=False`.

    Raises:
        `ValueError`: if the directory is not a complete Sugar checkpoint, is an adapter of a backbone that others do not
            have, or its card has invalid metadata.
        `HfHubHTTPError`: from the Hub.
    """
    directory = Path(directory)
    files = checkpoint_files(directory)
    api = HfApi(token=token, library_name="hf_sugar", library_version=__version__)
    configs = public_configs(directory, api, base_model)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)

    contents: dict[str, Path | bytes] = {**{file.as_posix(): directory / file for file in files}, **configs}
    if writes_card(directory):
        card = model_card(directory, repo_id, base_model=base_model, license=license, tags=tags, api=api)
        contents["README.md"] = str(card).encode()
    return api.create_commit(
        repo_id,
        [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in contents.items()],
        commit_message=commit_message,
        revision=revision,
        create_pr=create_pr,
        run_as_future=not blocking,
    )


def complete_directory(directory: str | Path, repo_id: str, name_or_path: str) -> None:
    """Make ready the directory that `push_to_hub` of a model, loaded from `name_or_path`, is about to upload to `repo_id`: it
    refuses an adapter of a local backbone, and puts a card in the place of the empty one of transformers."""
    directory = Path(directory)
    api = HfApi(library_name="hf_sugar", library_version=__version__)
    public_configs(directory, api)
    if is_foreign(directory):
        base_model = name_or_path if is_hub_id(name_or_path) and name_or_path != repo_id else None
        model_card(directory, repo_id, base_model=base_model, api=api).save(directory / "README.md")
