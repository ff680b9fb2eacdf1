"""The teachers' embeddings as a column: made, kept, gone on with, read by the collator."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch
from rows import row

from hf_sugar.alignment import IMAGE, TEXT
from hf_sugar.cli.main import main
from hf_sugar.data import load_data, row_slices
from hf_sugar.models import SugarProcessor
from hf_sugar.teachers import TripleEncoder, add_teacher_embeddings, teachers_of
from hf_sugar.training import SugarCollator
from hf_sugar.world import checkpoint


TEXT_PARTS = datasets.List({"type": datasets.Value("string"), "text": datasets.Value("string")})
FEATURES = datasets.Features(
    {
        "messages": datasets.List({"role": datasets.Value("string"), "content": TEXT_PARTS}),
        "images": datasets.List(datasets.Image()),
        "id": datasets.Value("string"),
    }
)


def stories(first: int = 0, count: int = 40) -> datasets.Dataset:
    """Rows of five slices, some of which recur."""
    images = [tiny.image(i, 24, 20) for i in range(25)]
    rows = [
        row(
            f"star {'red ' * (i % 9)}", images[i % 25], f"left {i}", "circle", tiny.image(200 + i, 24, 20), id=f"s:{i}"
        )
        for i in range(first, first + count)
    ]
    return datasets.Dataset.from_list(rows, features=FEATURES)


class Recording:
    """An encoder that keeps what it is asked for, and stops at a call."""

    def __init__(self, encoder, stop_at=None):
        self.encoder, self.stop_at, self.calls = encoder, stop_at, []

    def __getattr__(self, name):
        return getattr(self.encoder, name)

    def encode(self, slices, **kwargs):
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        self.calls.append(list(slices))
        return self.encoder.encode(slices, **kwargs)


def add(dataset, encoder, directory, **kwargs):
    return add_teacher_embeddings(dataset, encoder, directory, **{"rows_per_shard": 8, **kwargs})


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("shard-*")}


@pytest.fixture(scope="module")
def uninterrupted(encoder, tmp_path_factory):
    """The directory, the dataset and what the encoder was asked for."""
    directory, recording = tmp_path_factory.mktemp("uninterrupted"), Recording(encoder)
    return directory, add(stories(), recording, directory), recording.calls


@pytest.fixture(scope="module")
def expected(encoder):
    """The embeddings of each row of `stories()`, by its id."""
    return {row["id"]: encoder.encode(row_slices(row)) for row in stories()}


def assert_rows(dataset, expected, count):
    found = 0
    for sample in dataset:
        values = torch.tensor(np.array(sample["teacher_embeddings"], dtype=np.float32))
        torch.testing.assert_close(values, expected[sample["id"]], atol=5e-4, rtol=0)
        assert sample["messages"][0]["content"][2]["text"] == f"left {sample['id'][2:]}"
        found += 1
    assert found == count


def test_the_column_holds_the_embeddings_of_each_row(uninterrupted, expected, encoder):
    directory, dataset, calls = uninterrupted
    assert_rows(dataset, expected, 40)
    assert dataset.features["teacher_embeddings"] == datasets.List(datasets.List(datasets.Value("float16"), length=44))
    assert set(dataset["teachers"]) == {encoder.record} and teachers_of(dataset) == json.loads(encoder.record)
    assert json.loads(encoder.record)["split"] == 24 and str(directory.parent) not in encoder.record
    shards = [datasets.Dataset.from_file(str(path)) for path in directory.glob("shard-*")]
    assert sum(map(len, shards)) == 40 and max(map(len, shards)) <= 8 and len(calls) == len(shards) < 20
    for call in calls:  # equal slices of a block once
        names = [item if isinstance(item, str) else item["bytes"] for item in call]
        assert len(names) == len(set(names)) and names.count("circle") == 1


def test_order_mixture_and_selection_change_nothing(uninterrupted, expected, encoder, tmp_path):
    directory = shutil.copytree(uninterrupted[0], tmp_path / "copy")
    nothing = Recording(encoder, stop_at=0)
    for count, dataset in (
        (40, stories().shuffle(seed=0)),
        (10, stories().shuffle(seed=1).select(range(3, 13))),
        (3, stories().select([39, 4, 4])),
        (40, datasets.concatenate_datasets([stories(20, 20), stories(0, 20)])),
        (20, stories().filter(lambda row: int(row["id"][2:]) % 2)),
    ):
        assert_rows(add(dataset, nothing, directory), expected, count)
    behind = add(
        stories().select([0, 2]), nothing, directory, rows_per_shard=1
    )  # a block ends, and unused rows follow
    assert_rows(behind, expected, 2)
    probabilities = {"probabilities": [0.3, 0.7], "seed": 3, "stopping_strategy": "all_exhausted"}
    mixed = datasets.interleave_datasets([stories(0, 10), stories(10, 30)], **probabilities)
    assert len(mixed) > 40
    assert_rows(add(mixed, nothing, directory), expected, len(mixed))
    # another source before it: its blocks end where they ended
    before = content(directory)
    recording = Recording(encoder)
    both = add(datasets.concatenate_datasets([stories(100, 13), stories()]), recording, directory)
    assert sum(len(call) for call in recording.calls) <= 13 * 5
    assert len(content(directory)) - len(before) < 8
    assert_rows(both.select(range(13, 53)), expected, 40)


def test_what_changed_is_embedded_again(uninterrupted, encoder, tmp_path):
    directory = shutil.copytree(uninterrupted[0], tmp_path / "copy")
    rows = stories().to_list()
    rows[20]["messages"][0]["content"][0]["text"] = "another"
    recording = Recording(encoder)
    add(datasets.Dataset.from_list(rows, features=FEATURES), recording, directory)
    assert [len(call) for call in recording.calls] == [5]
    # a file of another content
    file = tmp_path / "a.png"
    tiny.image(0).save(file)
    rows = datasets.Dataset.from_list(
        [{**row("star", tiny.image(0)), "images": [str(file)], "id": "f"}], features=FEATURES
    )
    first = add(rows, recording, directory)[0]["teacher_embeddings"]
    tiny.image(1, 40, 40).save(file)
    again = add(rows, recording, directory)[0]["teacher_embeddings"]
    assert len(recording.calls) == 3 and first[0] == again[0] and first[1] != again[1]


def test_streams(uninterrupted, expected, encoder, tmp_path):
    nothing = Recording(encoder, stop_at=0)
    stream = stories().to_iterable_dataset(num_shards=4)
    for dataset in (stream, stream.shuffle(seed=0, buffer_size=20)):
        assert_rows(add(dataset, nothing, uninterrupted[0], compute=False), expected, 40)
    directory, recording = tmp_path / "of-a-stream", Recording(encoder)
    assert_rows(add(stream, recording, directory), expected, 40)
    assert len(recording.calls) == 5
    assert_rows(add(stories(), nothing, directory), expected, 40)
    others = stories(200, 3).to_iterable_dataset()
    with pytest.raises(ValueError, match="the row s:200 has no teacher_embeddings in .* `hf-sugar prepare`"):
        next(iter(add(others, nothing, directory, compute=False)))
    with pytest.raises(ValueError, match="holds no teacher_embeddings, and a streaming dataset is not read .*online"):
        add(others, nothing, tmp_path / "empty", compute=False)


def test_the_result_is_an_ordinary_dataset(uninterrupted, expected, encoder, tmp_path):
    """Saved, mixed, streamed: what a training reads is the same, with no teacher and no directory."""
    dataset = uninterrupted[1]
    dataset.save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "rows.parquet")
    parquet = str(tmp_path / "rows.parquet")
    kept = dict(split="train", cache_dir=str(tmp_path / "cache"))
    for loaded in (
        datasets.load_from_disk(str(tmp_path / "saved")),
        datasets.load_dataset("parquet", data_files=parquet, **kept),
        datasets.load_dataset("parquet", data_files=parquet, split="train", streaming=True),
        pickle.loads(pickle.dumps(dataset)),
        datasets.concatenate_datasets([dataset.select(range(30)), dataset.select(range(30, 40))]).shuffle(seed=0),
    ):
        assert_rows(loaded, expected, 40)
        assert teachers_of(loaded)["fingerprint"] == encoder.fingerprint
        assert add_teacher_embeddings(loaded, encoder, tmp_path / "unused") is loaded
    assert not (tmp_path / "unused").exists()
    # rows in memory are pickled once, not once a block
    assert len(pickle.dumps(dataset)) < 1.5 * len(pickle.dumps(stories()))


def test_embeddings_of_other_teachers_are_refused(uninterrupted, encoder, clip_only, tmp_path):
    directory, dataset, _ = uninterrupted
    with pytest.raises(ValueError) as raised:
        add(stories(), clip_only, directory)
    for words in (str(directory), encoder.description, clip_only.description, "another directory", "delete"):
        assert words in str(raised.value)
    with pytest.raises(
        ValueError, match=r"(?s)other teachers.*there: .*image=dinov2@.*asked for: cross=.*remove_columns"
    ):
        add(dataset, clip_only, tmp_path)
    two = datasets.Dataset.from_dict({"teacher_embeddings": [[], []], "teachers": [encoder.record, clip_only.record]})
    with pytest.raises(ValueError, match="other teachers"):
        teachers_of(two)
    some = datasets.concatenate_datasets([dataset, stories()])
    with pytest.raises(ValueError, match="Some rows .* have teacher embeddings and others have none"):
        teachers_of(some)


def test_a_warm_start_reads_no_weights(uninterrupted, expected, checkpoints, monkeypatch):
    monkeypatch.setattr("hf_sugar.teachers.checkpoint.AutoModel", None)
    fresh = TripleEncoder(checkpoints["dinov2"], checkpoints["bert"], checkpoints["clip"], device="cpu")
    assert_rows(add(stories(), fresh, uninterrupted[0]), expected, 40)
    assert all(words in fresh.description for words in ("image=", "text=", "cross=", checkpoints["clip"], "float32"))


def test_damaged_files_are_named(uninterrupted, expected, encoder, tmp_path):
    directory = shutil.copytree(uninterrupted[0], tmp_path / "copy")
    shard = min(directory.glob("shard-*"))
    whole = shard.read_bytes()
    shorter = datasets.Dataset.from_file(str(shard)).data.table.slice(1)
    with pa.OSFile(str(tmp_path / "short"), "wb") as file, pa.ipc.new_stream(file, shorter.schema) as stream:
        stream.write_table(shorter)
    for damaged in (b"", b"damaged", whole[: len(whole) // 2], whole[:-200], (tmp_path / "short").read_bytes()):
        shard.unlink()  # what is mapped stays as it was
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{shard.name} is damaged.*Delete it"):
            add(stories(), encoder, directory)
    shard.unlink()
    assert_rows(add(stories(), encoder, directory), expected, 40)
    for damaged in (b"", b"{", b"[]", b"{}", b"\xe9"):
        (directory / "teacher_embeddings.json").write_bytes(damaged)
        with pytest.raises(ValueError, match="teacher_embeddings.json, which says what made .* cannot be read"):
            add(stories(), encoder, directory)


def test_a_write_that_fails_leaves_nothing(encoder, tmp_path, monkeypatch):
    def torn(path, target):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("hf_sugar.data.columns.os.replace", torn)
        with pytest.raises(OSError, match="disk full"):
            add(stories(0, 2), encoder, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_embeds_one_block_again(uninterrupted, expected, encoder, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        add(stories(), Recording(encoder, stop_at=3), tmp_path)
    assert content(tmp_path).items() <= content(uninterrupted[0]).items() and len(content(tmp_path)) == 3
    rest = Recording(encoder)
    assert_rows(add(stories(), rest, tmp_path), expected, 40)
    assert len(rest.calls) == len(uninterrupted[2]) - 3
    assert content(tmp_path) == content(uninterrupted[0])


WORKER = """
import datasets, sys, torch
from hf_sugar.teachers import TripleEncoder, add_teacher_embeddings
torch.set_num_threads(1)
encoder = TripleEncoder(*sys.argv[3:], device="cpu", batch_size=3)
add_teacher_embeddings(datasets.load_from_disk(sys.argv[1]), encoder, sys.argv[2], rows_per_shard=8)
"""


@pytest.mark.extras
def test_a_run_that_is_killed_goes_on_to_the_same_bytes(uninterrupted, checkpoints, encoder, tmp_path):
    """Killed ten times, when another shard is there, and some time after."""
    random, whole, directory = np.random.RandomState(0), content(uninterrupted[0]), tmp_path / "shards"
    stories().save_to_disk(tmp_path / "rows")
    paths = [checkpoints[name] for name in ("dinov2", "bert", "clip")]
    command = [sys.executable, "-c", WORKER, str(tmp_path / "rows"), str(directory), *paths]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    for _ in range(10):
        before = len(content(directory))
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        while worker.poll() is None and len(content(directory)) == before:
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.02))
        worker.kill()
        worker.communicate()
        found = content(directory)
        assert found.items() <= whole.items() and (len(found) > before or before == len(whole))
    add(stories(), encoder, directory)
    assert content(directory) == whole


def test_rows_of_every_layout(encoder, tmp_path):
    def message(role, *parts):
        return {"role": role, "content": [{"type": "text" if p else "image", "text": p} for p in parts]}

    prompt = [message("system", "Be brief."), message("user", None, "left of")]
    rows = [{"prompt": prompt, "completion": [message("assistant", "star")], "image": tiny.image(0)}]
    features = {"prompt": FEATURES["messages"], "completion": FEATURES["messages"], "image": datasets.Image()}
    rows = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    [values] = add(rows, encoder, tmp_path)["teacher_embeddings"]
    expected = encoder.encode([tiny.image(0), "left of", "star"])
    torch.testing.assert_close(torch.tensor(values), expected, atol=5e-4, rtol=0, check_dtype=False)
    recording = Recording(encoder)
    kept_out = add(stories(0, 2).add_column("structure", [False, True]), recording, tmp_path)
    assert list(map(len, kept_out["teacher_embeddings"])) == [0, 5]
    assert sum(map(len, recording.calls)) == 5


def test_a_row_that_cannot_be_embedded_is_named(encoder, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    rows = stories(0, 3).to_list()
    rows[1]["images"][1] = {"path": str(tmp_path / "broken.png"), "bytes": None}
    with pytest.raises(ValueError, match=r"row 1 \(s:1\), images\[1\]: .*broken.png.*cannot be decoded"):
        add(datasets.Dataset.from_list(rows, features=FEATURES), encoder, tmp_path)
    rows[1] = {**row("star", "  "), "id": "s:1"}
    for dataset in (datasets.Dataset.from_list(rows, features=FEATURES).select([2, 1, 0]), None):
        dataset = dataset or datasets.Dataset.from_list(rows, features=FEATURES).to_iterable_dataset()
        with pytest.raises(ValueError, match=r"row 1 \(s:1\).*is empty"):
            add(dataset, encoder, tmp_path)


@pytest.fixture(scope="module")
def processor():
    return SugarProcessor.from_pretrained(checkpoint("llava"))


def test_the_collator_reads_the_column(uninterrupted, encoder, processor):
    """As if the teachers were asked, in every order of the rows and both of a caption."""
    captions = [row(tiny.image(n), f"star {n}", id=f"c:{n}", loss_on="captions", structure=True) for n in range(6)]
    kinds = {"loss_on": datasets.Value("string"), "structure": datasets.Value("bool")}
    stored = [{**sample, "loss_on": "text", "structure": n != 1} for n, sample in enumerate(stories(0, 3))]
    rows = datasets.Dataset.from_list(captions + stored, features=datasets.Features({**FEATURES, **kinds}))
    rows = add(rows, encoder, uninterrupted[0].parent / "collated").shuffle(seed=0)
    online = SugarCollator(processor, embed_slices=encoder.encode, flip_captions=True)(list(rows))
    for dataset in (rows, rows.with_format("numpy", columns=["teacher_embeddings"], output_all_columns=True)):
        batch = SugarCollator(processor, teachers=encoder.record, flip_captions=True)(list(dataset))
        assert batch.keys() == online.keys()
        for name, value in online.items():
            torch.testing.assert_close(batch[name], value, atol=5e-4, rtol=0)
        for half in batch["teacher_embeddings"][batch["slice_modality"] >= 0].split([24, 20], dim=1):
            torch.testing.assert_close(half.norm(dim=1), torch.ones(len(half)), atol=1e-6, rtol=0)
    modality = batch["slice_modality"]
    captions = (modality >= 0).sum(1) == 2
    assert {tuple(kinds) for kinds in modality[captions, :2].tolist()} == {(TEXT, IMAGE), (IMAGE, TEXT)}


def test_the_collator_refuses_a_column_that_does_not_fit(uninterrupted, encoder, clip_only, processor):
    samples = [{**sample, "loss_on": "text"} for sample in uninterrupted[1].select(range(2))]
    collator = SugarCollator(processor, teachers=encoder.record)
    values = np.array(samples[1]["teacher_embeddings"])
    for change, message in (
        ({"teacher_embeddings": None}, "Row s:1 has no `teacher_embeddings`. Run `hf-sugar prepare`"),
        ({"teacher_embeddings": values[:3]}, "Row s:1 has 3 `teacher_embeddings` for 5 slices. Remove the column"),
        ({"teacher_embeddings": values * 0.9}, "Row s:1 .* not of length one"),
        ({"teacher_embeddings": values * np.nan}, "Row s:1 .* not of length one"),
        ({"teachers": clip_only.record}, "(?s)other teachers.*there: +cross=.*asked for: +image="),
    ):
        with pytest.raises(ValueError, match=message):
            collator([samples[0], {**samples[1], **change}])


def test_prepare(encoder, checkpoints, tmp_path, capsys, caplog):
    records = []
    for n in range(4):
        tiny.image(n).save(tmp_path / f"{n}.png")
        turns = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": f"star {n}"}]
        records.append({"image": f"{n}.png", "conversations": turns})
    (tmp_path / "rows.json").write_text(json.dumps(records))
    teachers = {"image": checkpoints["dinov2"], "text": checkpoints["bert"], "cross": checkpoints["clip"]}
    command = ["prepare", "--train_data", str(tmp_path / "rows.json"), "--teachers", json.dumps(teachers)]
    command += ["--teacher_cache_dir", str(tmp_path / "cache")]
    output = ["--dataset_dir", str(tmp_path / "prepared")]
    for options, damaged, printed in (
        (output, False, "4 rows, 0 skipped, 9 encoded"),
        (["--streaming", "True"], False, "4 rows, 0 skipped, 0 encoded"),
        (["--on_bad_row", "skip"], True, "4 rows, 1 skipped, 0 encoded"),
    ):
        if damaged:
            (tmp_path / "1.png").write_bytes(b"broken")
        main([*command, *options])
        assert printed in capsys.readouterr().out
    assert "row 1 (rows.json:2), images[0]" in caplog.text
    with pytest.raises(ValueError, match="leave `streaming` off"):
        main([*command, *output, "--streaming", "True"])
    for streaming in (False, True):
        prepared = load_data(str(tmp_path / "prepared" / "train"), streaming=streaming)
        assert teachers_of(prepared)["fingerprint"] == encoder.fingerprint
        for n, sample in enumerate(prepared):
            values = torch.tensor(np.array(sample["teacher_embeddings"], np.float32))
            slices = [tiny.image(n), "what is it?", f"star {n}"]
            torch.testing.assert_close(values, encoder.encode(slices), atol=5e-4, rtol=0)
