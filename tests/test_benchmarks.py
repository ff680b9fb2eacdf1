"""The benchmark of the paper's claims: its world, its verdicts, and that it runs and goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from hf_sugar import TripleEncoder
from hf_sugar.alignment import label_matrix
from hf_sugar.world import world_teachers


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from claims import CHANCE, CLAIMS, LABELS, SETTINGS, verdict  # noqa: E402
from claims_world import ORDERS, held_out_documents, in_turns, training_rows  # noqa: E402


def test_the_claims_world():
    batches = {"captions": 2, "stories": 2}
    rows = training_rows(batches, 8)
    turns = [row.split(":")[0] for row in in_turns(rows, batches, 8, seed=0)["id"]]
    assert all(len(set(turns[n : n + 8])) == 1 for n in range(0, 32, 8)) and len(set(turns)) == 2
    assert in_turns(rows, batches, 8, seed=0, without="captions")["images"] != rows.select(range(16))["images"]
    assert set(in_turns(rows, batches, 8, 0, "captions")["loss_on"]) == {"text"}

    searches = held_out_documents(seed=0, groups=1)
    queries, candidates, others, _, own = searches["documents"]
    texts = [[part for part in story if isinstance(part, str)] for story in candidates]
    assert [[part for part in story if isinstance(part, str)] for story in queries] == texts
    assert all(sorted(texts[0]) == sorted(texts[n]) for n in range(len(texts)))  # the heroes share their events
    assert others[7] | own[7] == set(range(6, 12)) and searches["orders"].relevant[7] == own[7] == {7}
    assert not any(a.tobytes() == b.tobytes() for a, b in zip(queries[0][1::2], candidates[0][1::2], strict=True))


def test_labels_of_orders():
    """What the mean kernel cannot tell, the alignment kernel does."""
    search = held_out_documents(seed=0, groups=1)["orders"]
    encoder = TripleEncoder.from_teachers(world_teachers())
    stories = search.queries[: len(ORDERS)] + search.candidates[: len(ORDERS)]
    embeddings = torch.cat([encoder.encode(story) for story in stories])
    labels = {
        kernel: label_matrix(
            embeddings,
            torch.arange(0, len(embeddings) + 1, 6),
            torch.stack([torch.arange(len(stories)), torch.full((len(stories),), 6)], dim=1),
            label_kernel=kernel,
            modality=torch.tensor([0, 1] * (len(embeddings) // 2)),
            split=encoder.split,
        )[0][: len(ORDERS), len(ORDERS) :]
        for kernel in ("gak", "mean")
    }
    assert (labels["gak"].argmax(dim=1) == torch.arange(len(ORDERS))).all()
    assert labels["gak"].diag().mean() - labels["gak"].mean() > 0.2
    assert labels["mean"].std() < 0.05


@pytest.mark.parametrize(
    ("kind", "ours", "others", "word"),
    [
        ("gain", [60, 62, 61], [50, 53, 50], "reproduced"),
        ("gain", [50, 53, 50], [60, 62, 61], "refuted"),
        ("gain", [50, 62, 50], [53, 55, 51], "no difference seen"),
        ("gain", [1, 2, 1], [0, 1, 2], "not testable"),
        ("gain", [99, 98, 98], [98, 99, 98], "not testable"),
        ("gain", [60, 61], [50, 51], "not testable"),
        ("kept", [60, 62, 61], [61, 62.5, 62], "reproduced"),
        ("kept", [50, 52, 51], [61, 62.5, 62], "refuted"),
        ("kept", [50, 52, 61], [61, 52.5, 52], "undecided"),
        ("flat", [60, 62, 61], [61, 62.5, 62], "reproduced"),
        ("flat", [50, 52, 51], [61, 62.5, 62], "refuted"),
        ("flat", [50, 52, 61], [61, 52.5, 52], "undecided"),
    ],
)
def test_verdict(kind, ours, others, word):
    mean, interval, found = verdict(kind, ours, others, (0.0, 0.0))
    assert found == word
    if len(ours) > 2:
        low, high = stats.ttest_rel(ours, others).confidence_interval(0.95)
        assert interval == f"{low:+.1f} to {high:+.1f}" and mean == f"{np.mean(ours) - np.mean(others):+.1f}"


def test_claims_name_what_is_there():
    assert {setting for _, _, *pair, _ in CLAIMS for setting in pair} <= set(SETTINGS)
    tasks = {name for *_, tasks in CLAIMS for task in tasks for name in (task if isinstance(task, tuple) else (task,))}
    assert set(CHANCE) <= tasks and not set(LABELS) & set(SETTINGS)


@pytest.mark.extras
def test_the_benchmark_of_the_server_runs():
    pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
    few = ["--sizes", "tiny", "--requests", "2", "--tokens", "2", "--repeat", "1"]
    finished = subprocess.run([sys.executable, BENCHMARKS / "serve.py", *few], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "| tiny | 2 embeddings |" in finished.stdout and "| tiny | 2 answers |" in finished.stdout


@pytest.mark.extras
@pytest.mark.timeout(900)
def test_the_claims_benchmark_runs_and_goes_on(tmp_path):
    script = BENCHMARKS / "claims.py"
    [short] = [line for line in script.read_text().splitlines() if line.endswith("# short")]
    command = [sys.executable, str(script), *short.partition("#")[0].split()[2:-1], str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run() -> tuple[str, int]:
        """The tables, and how many cells were computed."""
        finished = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr[-3000:]
        return finished.stdout[finished.stdout.index("| claim |") :], finished.stderr.count(", seed 0: ")

    tables, computed = run()
    assert computed == 3 and "| Retrieval helps answers |" in tables
    cell = tmp_path / "cells" / "both-0.json"
    figures = json.loads(cell.read_text())
    cell.unlink()
    assert run() == (tables, 1) and json.loads(cell.read_text()) == figures
