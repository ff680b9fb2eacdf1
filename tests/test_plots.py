import numpy as np
from PIL import Image
from test_evaluation import picture, unit

from hf_sugar.evaluation.plots import plot_alignment, plot_gallery, plot_losses, plot_similarities


def check_png(path, width, height):
    with Image.open(path) as image:
        assert image.format == "PNG" and image.size == (width, height)
        colors = image.convert("RGB").getcolors(maxcolors=10**6)
    assert len(colors) > 20 and list(path.parent.glob(".*")) == []
    return {color: count for count, color in colors}


def test_plots(tmp_path):
    path = tmp_path / "new" / "picture.png"
    log = [{"step": s, "generative_loss": 2 / (1 + s), "structure_loss": 9 / (1 + s), "loss": 1.0} for s in range(10)]
    log.append({"step": 10, "eval_generative_loss": 0.4, "eval_structure_loss": 1.0})
    plot_losses({"a": log, "b": [{"step": 1, "generative_loss": 1.0}]}, path)
    check_png(path, 1200, 480)
    plot_losses({"a": [*log, {"step": 10, "contrastive_loss": 1.0}]}, path)
    check_png(path, 1800, 480)
    rows, columns = ["A $5 circle, or $6.", picture("red")], [picture("blue", (40, 20)), "text " * 50, picture("red")]
    plot_alignment(np.full((2, 3), 0.5), rows, columns, path)
    check_png(path, int(150 * 5.6), int(150 * 3.7))
    x = unit(np.random.default_rng(0).normal(size=(12, 4)))
    plot_similarities(np.clip(x @ x.T, 0, 1), x @ x.T, path)
    check_png(path, 1200, 600)


def test_plot_gallery(tmp_path):
    hits, framed = [picture("red"), picture("blue")], (42, 157, 74)
    rows = [
        {"query": "a $1 red image", "truth": hits[0], "hits": hits, "correct": [True, False]},
        {"query": ["a", hits[0], "b"], "truth": "blue", "hits": ["blue", ["red", hits[1]]], "correct": [False, False]},
    ]
    plot_gallery(rows, tmp_path / "g.png")
    size = int(150 * (3.6 + 1.3 + 1.3 + 2.4 + 0.4)), int(150 * (2 * 1.25 + 0.4))
    assert check_png(tmp_path / "g.png", *size)[framed] > 1000
    plot_gallery([{**row, "correct": [False, False]} for row in rows], tmp_path / "g.png", ["SFT 1", "Sugar 1"])
    assert framed not in check_png(tmp_path / "g.png", *size)
