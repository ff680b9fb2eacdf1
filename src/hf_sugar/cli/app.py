import importlib.util
import os
from dataclasses import dataclass, field
from pathlib import Path

from .embed import ModelArguments


@dataclass
class AppArguments:
    """Settings of `hf-sugar app`."""

    index: str = field(default="index", metadata={"help": "Directory of the index."})
    k: int = field(default=4, metadata={"help": "Documents that a search shows."})
    examples: int = field(default=1, metadata={"help": "Documents put before a question."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest answer."})
    server_name: str = field(
        default="127.0.0.1",
        metadata={"help": "Address to listen on; with the default only this machine can open the page."},
    )
    server_port: int | None = field(default=None, metadata={"help": "Port; by default the first free one from 7860."})
    max_file_size: str = field(default="10mb", metadata={"help": "Largest picture that is accepted."})


def main(model: ModelArguments, args: AppArguments) -> None:
    if importlib.util.find_spec("gradio") is None:
        raise ImportError(
            "`hf-sugar app` needs Gradio: install hf_sugar with its extra `app`, or `pip install gradio`."
        )
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    from hf_sugar.evaluation.plots import plot_alignment
    from hf_sugar.retrieval import SugarIndex, SugarRAG
    from hf_sugar.retrieval.app import build_page, launch

    embed = model.load()
    index = SugarIndex.load(args.index, embed=embed)
    rag = SugarRAG(embed.model, embed.processor, index, args.examples, args.max_new_tokens)
    if args.server_name not in ("127.0.0.1", "localhost", "::1"):
        print(f"Whoever reaches {args.server_name} can search this index and use this model.")
    page = build_page(rag, Path(model.model_name_or_path).name, args.k, plot_alignment)
    launch(page, args.server_name, args.server_port, args.max_file_size)
