"""The page of `hf-sugar app`: search an index and ask questions in the browser."""

import base64
import io
import tempfile
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image

from ..alignment import expected_alignment
from ..data import load_image, row_slices
from ..models.rows_sugar import fill_images
from .base import Hit
from .rag import SugarRAG


CSS = """
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); gap: 12px; }
.card { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 8px; font-size: 13px; }
.card img { width: 100%; height: 120px; object-fit: contain; background: #fff; border-radius: 4px; }
.card .score { float: right; font-variant-numeric: tabular-nums; color: var(--body-text-color-subdued); }
.card p { margin: 4px 0 0; overflow-wrap: anywhere; }
"""


def build_page(rag: SugarRAG, title: str, k: int, plot_alignment: Callable) -> gr.Blocks:
    """The page over a model and its index, to be launched by [`launch`]: `k` documents of a search, and answers with `rag.k` examples,
    unless the user sets other numbers. What the user uploads stays in the folder of temporary files of Gradio; found images
    are sent in the page itself, so no file of the index is served. `plot_alignment` is that of [`~evaluation.plots`]."""
    index = rag.index

    def query(text: str | None, image: str | None, needed: bool = True) -> list[str | Image.Image]:
        parts: list[str | Image.Image] = []
        if image:
            try:
                parts.append(load_image(Path(image), "the picture"))
            except (ValueError, OSError) as error:
                # not the path, which is the server's
                raise gr.Error(f"The picture cannot be read ({type(error).__name__}).") from error
        if text and text.strip():
            parts.append(text.strip())
        if needed and not parts:
            raise gr.Error("There is no query yet: write a text, choose a picture, or both.")
        return parts

    def search(text: str | None, image: str | None, k: int) -> tuple[str, list[dict], Any]:
        [hits] = _or_error(index.search, [query(text, image)], int(k))
        return _shown(index, hits)

    def ask(text: str | None, image: str | None, k: int) -> Iterator[tuple[str, str, list[dict], Any]]:
        rag.k = int(k)
        prompt = _or_error(rag.prompt, query(text, image))
        answer = f"*{prompt.note}*\n\n" if prompt.note else ""
        yield answer or "...", *_shown(index, prompt.citations)
        for piece in rag.stream(prompt):
            answer += escape(piece)
            yield answer, gr.skip(), gr.skip(), gr.skip()

    def align(text: str | None, image: str | None, hits: list[dict], rank: int | None) -> Image.Image | None:
        parts = query(text, image, needed=False)
        if not parts or rank is None or rank >= len(hits):
            return None
        document = row_slices(index.documents[hits[rank]["index"]], "the document")
        vectors = torch.from_numpy(index.embed([*parts, *document]))
        expected = expected_alignment(vectors[: len(parts)], vectors[len(parts) :])
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "alignment.png"
            plot_alignment(expected.numpy(), parts, document, path)
            return Image.open(io.BytesIO(path.read_bytes()))

    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.Markdown(f"# {escape(title)}\n{len(index)} documents. Search by text, picture or both, or ask.")
        hits = gr.State([])
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                text = gr.Textbox(label="Text", lines=2, elem_id="text")
                image = gr.Image(label="Picture", type="filepath", sources=["upload", "clipboard"], height=220)
                documents = gr.Slider(1, 20, value=k, step=1, label="Search: documents shown")
                examples = gr.Slider(1, 20, value=rag.k, step=1, label="Ask: examples before the question")
                with gr.Row():
                    search_button = gr.Button("Search", elem_id="search")
                    ask_button = gr.Button("Ask", variant="primary", elem_id="ask")
            with gr.Column(scale=3):
                answer = gr.Markdown(label="Answer", show_label=True, elem_id="answer", container=True, min_height=60)
                cards = gr.HTML(elem_id="cards")
                rank = gr.Dropdown([], label="Alignment of the query with", elem_id="rank")
                heat_map = gr.Image(label="Expected alignment", interactive=False, elem_id="alignment", buttons=[])
        # one model: one pass at a time
        one = {"concurrency_limit": 1, "concurrency_id": "model"}
        found = [cards, hits, rank]
        to_align = {"fn": align, "inputs": [text, image, hits, rank], "outputs": heat_map, **one}
        gr.on(
            [search_button.click, text.submit], search, [text, image, documents], found, api_name="search", **one
        ).success(lambda: "", outputs=answer, api_name=False).then(**to_align, api_name=False)
        ask_button.click(ask, [text, image, examples], [answer, *found], api_name="ask", **one).then(
            **to_align, api_name=False
        )
        rank.input(**to_align, api_name="align")
    return page


def launch(page: gr.Blocks, server_name: str, server_port: int | None, max_file_size: str) -> Any:
    """Serve a page of [`build_page`] at `server_name`, without anything from another host: on `server_port` (by default the
    first free one from 7860), for uploads up to `max_file_size` (such as `"10mb"`)."""
    return page.queue(default_concurrency_limit=1).launch(
        server_name=server_name,
        server_port=server_port,
        max_file_size=max_file_size,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=CSS,
        footer_links=[],
        share=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
    )


def _or_error(function: Any, *args: Any) -> Any:
    """What is wrong with a query is shown on the page."""
    try:
        return function(*args)
    except ValueError as error:
        raise gr.Error(str(error)) from error


def _shown(index: Any, hits: list[Hit]) -> tuple[str, list[dict], Any]:
    """The cards of hits, the hits as plain data, and the choice among them."""
    cards, choices = [], []
    for number, hit in enumerate(hits, 1):
        choices.append((f"{number}. {hit.name}", number - 1))
        row = index.documents[hit.index]
        parts = [part for m in fill_images(row["messages"], row["images"]) for part in m["content"]]
        texts = [part["text"].strip()[:300] for part in parts if part["type"] == "text"]
        more = f"<p>and {len(row['images']) - 1} more pictures</p>" if len(row["images"]) > 1 else ""
        cards.append(
            f'<div class="card"><span class="score">{hit.score:.4f}</span><b>{number}. {escape(hit.name)}</b>'
            f"{'' if hit.slice is None else f' up to slice {hit.slice}'}"
            f"{''.join(map(_thumbnail, row['images'][:1]))}{more}"
            f"{''.join(f'<p>{escape(text)}</p>' for text in texts if text)}</div>"
        )
    choice = gr.Dropdown(choices, value=0 if hits else None)
    return f'<div class="cards">{"".join(cards)}</div>', [vars(hit) for hit in hits], choice


def _thumbnail(image: Any) -> str:
    image = load_image(image, "the document").copy()
    image.thumbnail((320, 320))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}">'
