from dataclasses import dataclass, field

from huggingface_hub import CommitInfo

from hf_sugar.hub import push_checkpoint


@dataclass
class PushArguments:
    """Settings of `hf-sugar push`."""

    checkpoint_dir: str | None = field(
        default=None, metadata={"help": "Full checkpoint or adapter directory; also the first argument by itself."}
    )
    repo_id: str | None = field(default=None, metadata={"help": "Where to, for example me/my-sugar."})
    private: bool = field(default=False, metadata={"help": "Make a new repository private."})
    revision: str | None = field(
        default=None, metadata={"help": "Branch to commit to, made if it is not there. Defaults to main."}
    )
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead."})
    base_model: str | None = field(
        default=None,
        metadata={
            "help": "Hub id of the model that the training started from. Needed for an adapter of a local backbone."
        },
    )
    license: str | None = field(
        default=None, metadata={"help": "Licence for the card. Defaults to what the base model states, if it does."}
    )
    commit_message: str = field(default="Upload Sugar model with hf_sugar", metadata={"help": "Title of the commit."})


def push(args: PushArguments) -> CommitInfo:
    """
    Publish a checkpoint directory, see [`~hub.push_checkpoint`].

    Args:
        args ([`PushArguments`]):
            What and where to.

    Returns:
        [`~huggingface_hub.CommitInfo`]
    """
    for name in ("checkpoint_dir", "repo_id"):
        if getattr(args, name) is None:
            raise ValueError(f"`{name}` is not set: hf-sugar push CHECKPOINT_DIR --repo_id me/my-sugar.")
    settings = {**vars(args), "private": args.private or None}
    return push_checkpoint(settings.pop("checkpoint_dir"), settings.pop("repo_id"), **settings)


def main(args: PushArguments) -> None:
    commit = push(args)
    print(commit.pr_url or commit.commit_url)
