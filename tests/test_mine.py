"""Hard negatives: against a search of every candidate for every row, and from the command line to the loss."""

import hashlib
import json

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
import yaml
from datasets import Dataset, Features, Image, List, load_from_disk
from tiny_runs import FEATURES, caption, conversation, image_part, rows, text_part

from hf_sugar import SugarIndex
from hf_sugar.cli.main import main
from hf_sugar.data import load_data, load_image
from hf_sugar.retrieval import mine_negatives


def vector(item, salt, dim=4):
    """Of a text, or of the pixels of an image."""
    item = item if isinstance(item, str) else load_image(item).tobytes().hex()
    seed = int.from_bytes(hashlib.sha256(f"{salt} {item}".encode()).digest()[:4])
    return F.normalize(torch.randn(dim, generator=torch.Generator().manual_seed(seed)), dim=0)


class Encoder:
    """Two halves: the first compares slices of one kind, the second would give another result."""

    split = 4

    def encode(self, items, names):
        assert len(items) == len(names) == len(set(items if isinstance(items[0], str) else names))
        halves = [torch.stack([vector(item, salt) for item in items]) for salt in ("first", "second")]
        return torch.cat(halves, dim=1)


def asked(row):
    """What a conversation says and shows."""
    return row["messages"][0]["content"][1]["text"] + load_image(row["images"][0]).tobytes().hex()


def embed(items):
    items = [asked(item) if isinstance(item, dict) else item for item in items]
    return torch.stack([vector(item, "model") for item in items]).numpy()


def captions(n=100):
    """Every image has two captions, and many rows have the same one."""
    messages = [[{"role": "user", "content": [image_part(), text_part(f"text {3 * i % 40}")]}] for i in range(n)]
    data = [
        {"messages": m, "images": [tiny.image(i // 2)], "loss_on": "captions", "id": f"row-{i}"}
        for i, m in enumerate(messages)
    ]
    return Dataset.from_list(data, features=FEATURES)


def expected(questions, answers, candidates, num_negatives, num_candidates, margin):
    """From the definition: `answers` by row, and all that is right to the question of each."""
    first = [vector(a[0], "first") for a in answers]
    rest = [float(a @ b) for i, a in enumerate(first) for j, b in enumerate(first) if i != j]
    mean, result = np.mean(rest), []
    for question, own in zip(questions, answers):
        right = {answer for other, many in zip(questions, answers) if other == question for answer in many}
        ranked = sorted(candidates, key=lambda c: -float(vector(question, "model") @ vector(c, "model")))
        chosen = []
        for candidate in ranked[:num_candidates]:
            nearness = [(float(vector(candidate, "first") @ vector(a, "first")) - mean) / (1 - mean) for a in own]
            if candidate not in right and max(nearness) < 1 - margin:
                chosen.append(candidate)
        result.append(chosen[:num_negatives])
    return result


@pytest.mark.parametrize("margin", [0.001, 0.5])
def test_captions_against_every_candidate(margin, caplog):
    data, texts = captions(), [f"text {i}" for i in range(60)]
    index = SugarIndex.build(texts, embed)
    mined = mine_negatives(data, index, Encoder(), num_negatives=6, num_candidates=8, margin=margin)
    questions = [row["images"][0].tobytes().hex() for row in data]
    answers = [[row["messages"][0]["content"][1]["text"]] for row in data]
    wanted = expected(questions, answers, texts, 6, 8, margin)
    assert mined["negatives"][:] == wanted and mined.remove_columns("negatives").features == data.features
    fewer = sum(len(found) < 6 for found in wanted)
    assert (fewer > 20) == (margin == 0.5) and bool(fewer) == ("fewer than 6 negatives" in caplog.text)


def test_rows_with_positives_and_images(tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(20)]
    for i, file in enumerate(files):
        tiny.image(100 + i).save(file)
    answers = [[{"path": str(file), "bytes": None} for file in files[i : i + 2]] for i in range(6)]
    data = rows([conversation], 6).add_column("positives", answers, feature=List(Image()))
    index = SugarIndex.build(files, lambda items: embed([load_image(item) for item in items]))
    index.embed = embed
    mined = mine_negatives(data, index, Encoder(), num_negatives=2, num_candidates=8, margin=0.3)
    assert mined.features["negatives"] == List(Image())
    names = [load_image(file).tobytes().hex() for file in files]
    found = [[image.tobytes().hex() for image in row["negatives"]] for row in mined]
    right = [[names[i], names[i + 1]] for i in range(6)]
    wanted = expected(list(map(asked, data)), right, names, 2, 8, 0.3)
    assert found == wanted and min(map(len, found)) > 0


@pytest.mark.parametrize(
    ("data", "documents", "settings", "message"),
    [
        ([caption, conversation], ["a"], {}, r"row 1 \(row-1\) has nothing to mine for: .* no `positives`"),
        ([caption], ["a"], {"margin": 0}, "`margin` above 0"),
        ([caption], ["a"], {"num_negatives": 9, "num_candidates": 8}, "from 1 to `num_candidates`"),
        ([caption], [["a", "b"]], {}, "document 0 of the index has 2 texts, and a negative is one"),
        ([caption], [f"a blue square {i}" for i in range(12)], {"num_negatives": 1, "num_candidates": 1}, "No row"),
        ([caption], [tiny.image()], {}, "No row has a negative among 50 hits"),
    ],
)
def test_what_cannot_be_mined(data, documents, settings, message):
    def same(items):  # whatever it is
        return np.tile(np.float32([1, 0, 0, 0]), (len(items), 1))

    data = rows(data, 1 if message == "No row" else 12)
    with pytest.raises(ValueError, match=message):
        mine_negatives(data, SugarIndex.build(documents, same), Encoder(), **settings)


def test_rows_that_cannot_be_searched_for_and_a_second_time():
    data = rows([caption], 2).cast(Features({**FEATURES, "images": List(Image(decode=False))}))
    bad = data.map(
        lambda row, i: {"images": [{"bytes": b"no image", "path": None}] if i else row["images"]}, with_indices=True
    )
    index = SugarIndex.build(["a"], embed)
    with pytest.raises(ValueError, match=r"row 1 \(row-1\), images\[0\]: .* cannot be decoded"):
        mine_negatives(bad, index, Encoder())
    mined = mine_negatives(data, index, Encoder())
    with pytest.raises(ValueError, match="has a column `negatives`"):
        mine_negatives(mined, index, Encoder())

    def refuse(items):
        raise ValueError("item 1 has 9000 tokens")

    index.embed = refuse
    with pytest.raises(ValueError, match=r"row 1 \(row-1\) has 9000 tokens"):
        mine_negatives(data, index, Encoder())


def test_from_the_command_line_to_the_loss(make, teachers, tmp_path, capsys):
    """What is mined is trained on as it is: every negative is a candidate."""
    data, model, output = tmp_path / "captions.parquet", str(tmp_path / "model"), tmp_path / "mined"
    rows([caption], 8).to_parquet(data)
    trainer = make(rows([caption], 4), max_steps=1)
    trainer.train()
    trainer.save_model(model)
    main(["index", model, str(data), "--by", "texts", "--index", str(tmp_path / "index")])
    settings = {
        "data": [{"path": str(data)}],
        "index": str(tmp_path / "index"),
        "output": str(output),
        "teachers": teachers,
        "num_negatives": 2,
        "rerank_rows": str(tmp_path / "yes-or-no"),
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings))
    command = ["mine", model, "--config", str(tmp_path / "mine.yaml")]
    main(command)
    printed = capsys.readouterr().out
    assert f"8 rows with negatives -> {output}" in printed and "rows that teach reranking -> " in printed
    with pytest.raises(ValueError, match="is there already. Name another directory, or set `overwrite`"):
        main(command)
    before = load_from_disk(output)["negatives"][:]
    main([*command, "--num_negatives", "3", "--overwrite"])
    mined = load_data(str(output))
    assert [found[:2] for found in mined["negatives"]] == before and max(map(len, mined["negatives"])) == 3

    taught = load_data(str(tmp_path / "yes-or-no"))
    words = [messages[1]["content"][0]["text"] for messages in taught["messages"]]
    assert words.count("yes") == 8 and words.count("no") == sum(map(bool, before)) and not any(taught["structure"])
    both = load_data([str(output), str(tmp_path / "yes-or-no")])
    make(both, path="taught", max_steps=1, per_device_train_batch_size=16).train()
    capsys.readouterr()
    main(["search", model, "a red circle", "--index", str(tmp_path / "index"), "--k", "2", "--rerank", "5", "--json"])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert len(found) == 2 and 1 > found[0]["score"] >= found[1]["score"] > 0

    trainer, seen = make(mined, path="trained", max_steps=1, per_device_train_batch_size=8), []
    trainer.discriminative_loss.contrastive.register_forward_hook(lambda _, inputs, loss: seen.append(inputs))
    trainer.train()
    [(queries, candidates, positives, _)] = seen
    assert len(queries) == positives.sum() == 8
    # first slices, captions alone, mined ones
    assert len(candidates) == 8 + 8 + sum(map(len, mined["negatives"]))
