"""Publish a checkpoint or an adapter on the Hub, with a model card."""

from dataclasses import dataclass

from huggingface_hub import CommitInfo

from hf_sugar.hub import push_checkpoint

from .arguments import setting


@dataclass
class PushArguments:
    """Settings of `hf-sugar push`, which are those of [`~hub.push_checkpoint`]."""

    checkpoint_dir: str = setting("Full checkpoint or adapter directory.")
    repo_id: str = setting("Where to, for example me/my-sugar.")
    private: bool = setting("Make a new repository private.", False)
    revision: str | None = setting("Branch to commit to, made if it is not there. Defaults to main.", None)
    create_pr: bool = setting("Open a pull request instead.", False)
    base_model: str | None = setting("Hub id of the model that was trained. Needed if it is a local one.", None)
    license: str | None = setting("Licence for the card. Defaults to what the base model states, if it does.", None)


def push(args: PushArguments) -> CommitInfo:
    """Publish a checkpoint directory."""
    settings = {**vars(args), "private": args.private or None}
    commit = push_checkpoint(settings.pop("checkpoint_dir"), settings.pop("repo_id"), **settings)
    print(commit.pr_url or commit.commit_url)
    return commit
