import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from rows import row

from hf_sugar import SugarEmbedder, SugarForConditionalGeneration, SugarGenerator, SugarProcessor


@pytest.fixture(scope="module")
def pair():
    """A model, left in training mode, and its processor."""
    model = SugarForConditionalGeneration.from_vlm(tiny.llava(), retrieval_dim=16).train()
    return model, SugarProcessor.from_processor(tiny.processor())


def test_a_random_projector_is_warned_of(pair, caplog, monkeypatch):
    SugarEmbedder(*pair, project=False)
    assert not caplog.records
    SugarEmbedder(*pair)
    assert "The retrieval projector is random: train the model" in caplog.text
    caplog.clear()
    monkeypatch.setattr(pair[0].config, "random_projector", False)  # as the warning says
    SugarEmbedder(*pair)
    assert not caplog.records


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_items_of_every_kind(pair, batch_size, tmp_path):
    model, processor = pair
    image = tiny.image(0)
    image.save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a red circle\n")
    items = [
        " a red circle ",
        ["a red circle"],
        tmp_path / "a.txt",
        {"type": "text", "text": "a red circle"},
        image,
        tmp_path / "a.png",
        {"type": "image", "image": image},
        ["one", image, "two"],
        ("one", tmp_path / "a.png", {"type": "text", "text": "two"}),
        row("one", image, "two"),
    ]
    embeddings = SugarEmbedder(model, processor, batch_size)(items)
    with torch.no_grad():
        model.eval()
        direct = [model.embed(**processor.embed_inputs([item])).numpy() for item in (items[1], items[4], items[7])]
        model.train()
    expected = np.repeat(np.concatenate(direct), [4, 3, 3], axis=0)
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)
    assert embeddings.dtype == np.float32


def test_every_slice_is_the_prefix_embedded_apart(pair):
    embed = SugarEmbedder(*pair, batch_size=4)
    documents = [[f"one {i}", tiny.image(i), "a red circle", tiny.image(i + 9)][: 4 - i % 2] for i in range(6)]
    prefixes = [document[: n + 1] for document in documents for n in range(len(document))]
    found = embed.every_slice(documents)
    assert [len(embeddings) for embeddings in found] == [4, 3, 4, 3, 4, 3]
    np.testing.assert_allclose(np.concatenate(found), embed(prefixes), atol=1e-5)


def test_white_space_at_the_ends(pair):
    """`embed_inputs` embeds a text as it is given, as an export does; the embedder without what files end with."""
    model, processor = pair
    given, plain = (processor.embed_inputs([text])["input_ids"].tolist() for text in (" blue", "blue"))
    assert given != plain
    embed = SugarEmbedder(model, processor)
    np.testing.assert_array_equal(embed([" blue \n"]), embed(["blue"]))


def test_short_embeddings(pair):
    """Cut and normalised again."""
    items = [["one", tiny.image(0), "two"], "a red circle"]
    whole = SugarEmbedder(*pair)
    for project in (True, False):
        full = SugarEmbedder(*pair, project=project)(items)
        short = SugarEmbedder(*pair, project=project, truncate_dim=5)
        expected = full[:, :5] / np.linalg.norm(full[:, :5], axis=1, keepdims=True)
        np.testing.assert_allclose(short(items), expected, atol=1e-6)
        assert short.dim == 5 and [len(e[0]) for e in short.every_slice(items)] == [5, 5]
    assert len({e.fingerprint for e in (whole, short, SugarEmbedder(*pair, truncate_dim=5))}) == 3
    for wrong in (0, 17):
        with pytest.raises(ValueError, match=f"`truncate_dim` is {wrong}; it must be from 1 to 16"):
            SugarEmbedder(*pair, truncate_dim=wrong)(["a"])


@pytest.mark.parametrize("size", [0, -1])
def test_sizes(pair, size):
    for make, name in (
        (SugarEmbedder, "batch_size"),
        (SugarEmbedder, "max_batch_tokens"),
        (SugarGenerator, "batch_size"),
        (SugarGenerator, "max_new_tokens"),
    ):
        with pytest.raises(ValueError, match=f"`{name}` is {size}; it must be 1 or more"):
            make(*pair, **{name: size})


def test_without_the_projector(pair):
    model, processor = pair
    items = ["a much longer text than the other", ["a blue square", tiny.image(1)]]
    inputs = processor.embed_inputs(items[1:])
    slices = inputs.pop("slice_ids")[0]
    with torch.no_grad():
        hidden = model.eval().vlm.model(**inputs).last_hidden_state[0]
    model.train()
    for pooling, tokens in (("slice", slices == 1), ("mean", slices > -2)):
        found = SugarEmbedder(model, processor, project=False, pooling=pooling)(items)[1]
        expected = torch.nn.functional.normalize(hidden[tokens].mean(dim=0), dim=0)
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    with pytest.raises(ValueError, match="'slice' or 'mean'"):
        SugarEmbedder(model, processor, pooling="max")
    last = SugarForConditionalGeneration.from_vlm(tiny.llava(), image_pooling="last")
    with pytest.raises(ValueError, match="needs a model with `image_pooling='mean'`"):
        SugarEmbedder(last, processor, pooling="mean")


def test_lazily_decoded_items_are_loaded_window_by_window(pair):
    loaded = []

    class Lazy:
        def __len__(self):
            return 70

        def __getitem__(self, i):
            loaded.append(i)
            return f"text {i % 9}"

    seen = []
    embed = SugarEmbedder(*pair, batch_size=2)
    embed._forward, forward = lambda *args: seen.append(len(loaded)) or forward(*args), embed._forward
    embeddings = embed(Lazy())
    assert seen[0] == 32 and seen[-1] == 70 and loaded == list(range(70))
    np.testing.assert_allclose(embeddings[63:70], embeddings[:7], atol=1e-5)


def test_bad_items_are_named(pair, tmp_path):
    model, processor = pair
    embed = SugarEmbedder(model, processor, batch_size=4)
    for single in ("text", Image.new("RGB", (2, 2)), row("a")):
        with pytest.raises(TypeError, match="Put it in a list"):
            embed(single)
    with pytest.raises(ValueError, match="no items"):
        embed([])
    with pytest.raises(TypeError, match="item 1 is or holds float"):
        embed(["a", 1.5])
    (tmp_path / "damaged.png").write_bytes(b"no image")
    bad = {
        3: ("an <image> in it", "contains '<image>', a special token"),
        27: ("word " * 700, "the limit is 512"),
        30: (tmp_path / "damaged.png", "cannot be decoded"),
        31: (tmp_path / "missing.png", "not exist"),
        33: (["a", " "], "empty"),
    }
    items = [bad.get(n, (f"text {n}",))[0] for n in range(40)]
    for n, (item, says) in bad.items():
        with pytest.raises(ValueError, match=f"^item {n}[ :,].*{says}"):
            embed([*["text"] * n, item, "text"])
    errors = {}
    found = embed.every_slice(items, errors)
    assert sorted(errors) == sorted(bad) == [n for n, embeddings in enumerate(found) if embeddings is None]
    np.testing.assert_allclose(found[39][-1], embed(["text 39"])[0], atol=1e-5)

    broken = SugarForConditionalGeneration.from_vlm(tiny.llava(), retrieval_dim=16)
    broken.retrieval_projector.linear_1.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="item 0 is not finite in torch.float32"):
        SugarEmbedder(broken, processor)(["a"])
    assert model.training


def test_generator_equals_one_by_one(pair):
    model, processor = pair
    rows = [
        row("Hello"),
        row(tiny.image(0), "what is this?"),
        row("a longer one than the others", id="x"),
        {"messages": [{"role": "user", "content": "Hello"}], "images": []},
    ]
    rows[1]["messages"] += [
        {"role": "assistant", "content": [{"type": "text", "text": "a star"}]},
        row("and", tiny.image(1))["messages"][0],
    ]
    rows[1]["images"] += [tiny.image(1)]
    generate = SugarGenerator(model, processor, batch_size=3, max_new_tokens=6)
    answers = generate(rows)
    assert answers == [generate([row])[0] for row in rows] and answers[0] == answers[3] and len(set(answers)) > 1
    inputs = generate.inputs(rows[1:2])
    with torch.no_grad():
        [sequence] = model.eval().generate(**inputs, max_new_tokens=6, do_sample=False)
    new_tokens = sequence[inputs["input_ids"].shape[1] :]
    assert answers[1] == processor.decode(new_tokens, skip_special_tokens=True).strip()
    assert "".join(generate.stream(rows[1])).strip() == answers[1]
    model.train()
    [short] = SugarGenerator(model, processor, max_new_tokens=3)(rows[:1])
    assert short == "".join(generate.stream(rows[0], max_new_tokens=3)).strip()
    assert generate([]) == [] and model.training


def test_bad_conversations_are_named(pair, monkeypatch):
    model, processor = pair
    generate = SugarGenerator(model, processor)
    good, image = row("hm"), tiny.image(0)
    refuse = "{% if 'refuse' in messages[-1]['content'][-1]['text'] %}{{ raise_exception('not this one') }}{% endif %}"
    monkeypatch.setattr(processor, "chat_template", refuse + processor.chat_template)
    for bad, says in (
        ({**row(image, "a"), "images": []}, "holds 0 images but `messages` has 1"),
        (row("word " * 700, id="x"), "the limit is 512"),
        (row({"bytes": b"no image", "path": None}), r"images\[0\]: image of 8 bytes cannot be decoded"),
        (row("hm </s>"), "contains '</s>', a special token"),
        (row("an <image>", image), "contains '<image>', a special token"),
        (row("please refuse"), "cannot be put before the model: not this one"),
        (
            {**good, "messages": [*good["messages"], {"role": "assistant", "content": "hm"}]},
            "last turn is the assistant's",
        ),
    ):
        name = "row 2 \\(x\\)" if bad.get("id") else "row 2"
        with pytest.raises(ValueError, match=f"^{name}.*{says}"):
            generate([good, good, bad])
    with pytest.raises(TypeError, match="`conversations` is a single dict"):
        generate(good)


def test_a_stream_ends_with_its_reader_and_passes_errors_on(pair, monkeypatch):
    model, processor = pair
    generate = SugarGenerator(model, processor, max_new_tokens=400)
    steps = []
    forward = model.vlm.forward
    monkeypatch.setattr(model.vlm, "forward", lambda *a, **k: steps.append(1) or forward(*a, **k))
    stream = generate.stream(row("a star"))
    next(stream)
    stream.close()
    assert len(steps) < 300

    def broken(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "generate", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(generate.stream(row("a star")))
