import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import tiny
import tiny_backbones
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from rows import filled
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_sugar.cli.main import main
from hf_sugar.export import export_sentence_transformers
from hf_sugar.export.sentence_transformers import find_inexact_input, slice_end_template
from hf_sugar.models import SugarForConditionalGeneration, SugarProcessor


def needs_sentence_transformers(test):
    missing = importlib.util.find_spec("sentence_transformers") is None
    reason = "sentence-transformers is not installed: pip install -c constraints.txt -e '.[sentence-transformers]'"
    return pytest.mark.extras(pytest.mark.skipif(missing, reason=reason)(test))


IMAGES = [tiny.image(1), tiny.image(2, 40, 60)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """For each image pooling a checkpoint and its export by the command."""
    path = tmp_path_factory.mktemp("export")
    for pooling in ("last", "mean"):
        model = SugarForConditionalGeneration.from_vlm(tiny.llava(), retrieval_dim=16, image_pooling=pooling)
        model.save_pretrained(path / "random")
        model.config.random_projector = False
        model.save_pretrained(path / pooling / "sugar")
        SugarProcessor.from_processor(tiny.processor()).save_pretrained(path / pooling / "sugar")
        arguments = ["--format", "sentence-transformers", "--output", str(path / pooling / "export")]
        main(["export", str(path / pooling / "sugar"), *arguments])
    return path


def sugar(directory):
    return SugarForConditionalGeneration.from_pretrained(directory), SugarProcessor.from_pretrained(directory)


def types(directory) -> list[str]:
    return [module["type"].removeprefix("sentence_transformers.") for module in read(directory / "modules.json")]


def read(file):
    return json.loads(file.read_text(encoding="utf-8"))


# what sentence-transformers 6.2 saves
STOCK = [f"base.modules.{name}" for name in ("transformer.Transformer", "dense.Dense", "normalize.Normalize")]
STOCK = [STOCK[0], "sentence_transformer.modules.pooling.Pooling", STOCK[1], STOCK[1], STOCK[2]]


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_files(exported, pooling):
    directory, stock = exported / pooling / "export", pooling == "last"
    assert types(directory) == (STOCK if stock else ["sugar_transformer.SugarTransformer", *STOCK[1:]])
    code = set() if stock else {"sugar_transformer.py", "processing_sugar.py", "rows_sugar.py"}
    assert {file.name for file in directory.rglob("*.py")} == code and not list(directory.rglob("*.bin"))
    assert read(directory / "1_Pooling" / "config.json")["pooling_mode"] == ("lasttoken" if stock else "mean")
    assert read(directory / "sentence_bert_config.json").get("image_pooling") == (None if stock else "mean")
    assert read(directory / "config_sentence_transformers.json")["similarity_fn_name"] == "cosine"
    text = (directory / "README.md").read_text()
    assert ("trust_remote_code=True" in text) == (not stock) and "fetches from the" in text
    config = read(directory / "config.json")
    assert "auto_map" not in config
    assert config["architectures"] == [
        "LlavaForConditionalGeneration" if stock else "SugarLlavaForConditionalGeneration"
    ]
    assert config["sugar_embedding"] == {
        "chat_template": "chat_template.jinja",
        "text_pooling": "last",
        "image_pooling": pooling,
        "head": ["2_Dense", "3_Dense"],
        "normalize": True,
        "dimensions": 16,
        "query_instruction": None,
        "document_instruction": None,
    }
    template = slice_end_template(SugarProcessor.from_pretrained(exported / pooling / "sugar"))
    assert (directory / "chat_template.jinja").read_text() == template
    assert ("plugin" in text) == (not stock)
    for file in directory.rglob("*"):  # no path of this machine
        assert file.is_dir() or str(exported).encode() not in file.read_bytes(), file


def test_projector_is_two_dense_modules(exported):
    directory = exported / "last" / "export"
    projector = sugar(exported / "last" / "sugar")[0].retrieval_projector
    for path, linear in (("2_Dense", projector.linear_1), ("3_Dense", projector.linear_2)):
        config, weights = read(directory / path / "config.json"), load_file(directory / path / "model.safetensors")
        assert (config["out_features"], config["in_features"]) == tuple(linear.weight.shape)
        assert config["bias"] == (linear.bias is not None)
        assert set(weights) == {f"linear.{name}" for name, _ in linear.named_parameters()}
        assert torch.equal(weights["linear.weight"], linear.weight)


def test_short_embeddings(exported, tmp_path):
    model, processor = sugar(exported / "last" / "sugar")
    export_sentence_transformers(model, processor, tmp_path / "short", truncate_dim=8)
    config = read(tmp_path / "short" / "3_Dense" / "config.json")
    weight = load_file(tmp_path / "short" / "3_Dense" / "model.safetensors")["linear.weight"]
    assert config["out_features"] == 8 and torch.equal(weight, model.retrieval_projector.linear_2.weight[:8])
    assert read(tmp_path / "short" / "2_Dense" / "config.json")["out_features"] == weight.shape[1]
    with pytest.raises(ValueError, match="`truncate_dim` is 17; it must be from 1 to 16"):
        export_sentence_transformers(model, processor, tmp_path / "none", truncate_dim=17)
    assert not (tmp_path / "none").exists()


def test_backbone_of_an_adapter_repository(tmp_path):
    """What stock transformers loads answers as the adapted model does."""
    tiny.llava().save_pretrained(tmp_path / "llava")
    tiny.processor().save_pretrained(tmp_path / "llava")
    model = SugarForConditionalGeneration.from_backbone(tmp_path / "llava", retrieval_dim=16)
    lora = dict(r=4, target_modules=r"^vlm\.model\.language_model\..*\.(?:q_proj|v_proj)$", init_lora_weights=False)
    model = get_peft_model(model, LoraConfig(**lora, modules_to_save=["retrieval_projector"])).get_base_model()
    model.save_pretrained(tmp_path / "adapter")
    processor = SugarProcessor.from_pretrained(tmp_path / "llava")
    processor.save_pretrained(tmp_path / "adapter")
    main(["export", str(tmp_path / "adapter"), "--format", "backbone", "--output", str(tmp_path / "plain")])

    inputs = processor.encode_conversations([filled("a", IMAGES[0], "what is this?")])
    inputs.pop("slice_ids")
    plain, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert type(plain).__name__ == "LlavaForConditionalGeneration"
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs).logits, model.eval()(**inputs).logits, atol=1e-5, rtol=0)
        untouched = AutoModelForImageTextToText.from_pretrained(tmp_path / "llava")
        assert (untouched(**inputs).logits - plain(**inputs).logits).abs().max() > 1e-3
    assert AutoProcessor.from_pretrained(tmp_path / "plain").chat_template == processor.chat_template


CHATML = (
    "{%- for message in messages %}<|{{ message['role'] }}|>\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|end|>\n{% endfor %}\n"
)


@pytest.mark.parametrize("name", ["llava", "chatml"])
@pytest.mark.parametrize(
    "conversation, end, tail",
    [
        (filled("a star"), "a star", " "),
        (filled("end"), "end", " "),  # chatml has the same word behind it
        (filled("a star", IMAGES[0]), "a star <image>", "\n"),
        (filled(IMAGES[0], "user"), "user", " "),
        (filled("a") + [{"role": "assistant", "content": [{"type": "text", "text": "s"}]}], "s", "</s>"),
        ([{"role": "user", "content": "plain"}], "plain", " "),
    ],
)
def test_template_ends_with_the_last_slice(name, conversation, end, tail):
    processor = SugarProcessor.from_processor(tiny.processor(chat_template=tiny.LLAVA_TEMPLATE))
    if name == "chatml":
        processor.chat_template = CHATML
        end, tail = end.replace(" <", "<"), "<|end|>\n"
    whole = processor.apply_chat_template(conversation, tokenize=False)
    cut = processor.apply_chat_template(conversation, chat_template=slice_end_template(processor), tokenize=False)
    assert cut + tail == whole
    assert cut.endswith(end)


def test_template_begins_as_the_tokenizer_does():
    """Servers render the template and add no special token: what the tokenizer would add is in it, and never twice."""
    processor = SugarProcessor.from_processor(tiny.processor())
    conversation = filled("a star", IMAGES[0])
    before = processor.apply_chat_template(conversation, chat_template=slice_end_template(processor), tokenize=False)
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    for trained in (processor.chat_template, "{{ bos_token }}" + processor.chat_template):
        processor.chat_template = trained
        template = slice_end_template(processor)
        cut = processor.apply_chat_template(conversation, chat_template=template, tokenize=False)
        assert cut == f"<s>{before}" and find_inexact_input(processor, template) is None
        tokens = processor.encode_conversations([conversation])["input_ids"][0].tolist()
        served = processor(text=cut, images=IMAGES[:1], add_special_tokens=False)["input_ids"][0]
        assert served == tokens[: len(served)] and tokens.count(1) == 1


def test_template_refuses_what_it_would_lose():
    processor = SugarProcessor.from_processor(tiny.processor())
    template = slice_end_template(processor)
    pair = [{"role": "query", "content": "a"}, {"role": "document", "content": "b"}]
    with pytest.raises(Exception, match="role query is unknown; give images and texts that belong together"):
        processor.apply_chat_template(pair, chat_template=template, tokenize=False)
    video = [{"role": "user", "content": [{"type": "video", "video": "x.mp4"}]}]
    with pytest.raises(Exception, match="type video; use text or image"):
        processor.apply_chat_template(video, chat_template=template, tokenize=False)


def test_module_of_its_own_where_the_last_token_is_another(tmp_path):
    """A tokenizer that adds a token at the end: stock pooling would take that one."""
    processor = SugarProcessor.from_processor(tiny.processor())
    assert find_inexact_input(processor, slice_end_template(processor)) is None
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    assert "circle" in find_inexact_input(processor, slice_end_template(processor))
    model = SugarForConditionalGeneration.from_vlm(tiny.llava(), retrieval_dim=16, image_pooling="last")
    assert not export_sentence_transformers(model, processor, tmp_path)
    assert types(tmp_path)[0] == "sugar_transformer.SugarTransformer"
    assert read(tmp_path / "sentence_bert_config.json")["image_pooling"] == "last"


def test_instructions_and_lengths_of_the_configuration(tmp_path):
    model = SugarForConditionalGeneration.from_vlm(tiny.llava(), retrieval_dim=16, image_pooling="last")
    model.config.query_instruction, model.config.matryoshka_dims = "Find this.", [4, 16, 32]
    export_sentence_transformers(model, SugarProcessor.from_processor(tiny.processor()), tmp_path)
    assert read(tmp_path / "config_sentence_transformers.json")["prompts"] == {"query": "Find this."}
    config = read(tmp_path / "config.json")
    found = [config["sugar_embedding"][f"{role}_instruction"] for role in ("query", "document")]
    assert found == ["Find this.", None] and config["matryoshka_dimensions"] == [4, 16]


def test_errors_name_the_setting(exported, tmp_path):
    checkpoint, llava, out = exported / "last" / "sugar", tmp_path / "llava", ["--output", tmp_path / "out"]
    tiny.llava().save_pretrained(llava)
    for arguments, message in (
        (out, "`model_name_or_path` is not set"),
        ([checkpoint], "`output_dir` is not set"),
        ([checkpoint, *out, "--format", "gguf"], "`format` is 'gguf'"),
        ([checkpoint, *out, "--dtype", "float17"], "`dtype`"),
        ([tmp_path / "nowhere", *out], "nowhere"),
        ([llava, *out], "not trained .llava is a plain 'llava' model"),
        ([exported / "random", *out], "not trained .`random_projector` is true"),
        ([checkpoint, "--output", checkpoint], "exists and is not empty"),
    ):
        with pytest.raises((OSError, ValueError), match=message):
            main(["export", *map(str, arguments)])
    assert os.listdir(tmp_path) == ["llava"]


def test_a_failed_export_leaves_what_was_there(exported, tmp_path):
    model, processor = sugar(exported / "last" / "sugar")
    export_sentence_transformers(model, processor, tmp_path / "again")
    before = {file: file.stat() for file in (tmp_path / "again").rglob("*") if file.is_file()}
    with patch("hf_sugar.export.sentence_transformers.save_file", side_effect=OSError("disk full")):
        with pytest.raises(OSError, match="disk full"):
            main(["export", str(exported / "last" / "sugar"), "--output", str(tmp_path / "out")])
        with pytest.raises(OSError, match="disk full"):
            export_sentence_transformers(model, processor, tmp_path / "again")
    assert not any((tmp_path / "out").iterdir())
    assert {file: file.stat() for file in (tmp_path / "again").rglob("*") if file.is_file()} == before
    export_sentence_transformers(model, processor, tmp_path / "again")
    with pytest.raises(ValueError, match="holds no earlier export"):
        export_sentence_transformers(model, processor, tmp_path)


def load(directory, pooling: str):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(directory), trust_remote_code=pooling == "mean", device="cpu")


def embed(model, processor, items) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model.embed(**processor.embed_inputs([item])) for item in items])


@needs_sentence_transformers
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_sentence_transformers_gives_the_same_embeddings(exported, tmp_path, pooling):
    theirs = load(exported / pooling / "export", pooling)
    model, processor = sugar(exported / pooling / "sugar")
    first, second = IMAGES
    third = tiny.image(3)
    third.save(tmp_path / "third.png")

    def same(inputs, items):
        expected = embed(model, processor, items)
        assert len(items) == 1 or torch.pdist(expected).min() > 1e-3
        for batch_size in (1, 32):
            found = theirs.encode(inputs, batch_size=batch_size, convert_to_tensor=True)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)

    texts = [
        "a red circle",
        "A star.",
        "user",
        "end of 1 (2)",
        " blue",
        "a red circle and a blue square left of a star",
    ]
    same(texts, texts)
    same(IMAGES, IMAGES)
    mixed = ["a red circle", first, {"text": "what?", "image": second}, {"image": first, "text": "what?"}]
    same([*mixed, str(tmp_path / "third.png")], ["a red circle", first, ["what?", second], [first, "what?"], third])
    parts = [["what is this?"], [first], [first, "what is this?"], ["what is this?", first], [first, second]]
    parts += [["a", first, "b", second, "c."], ["a", first, second, "b", second]]
    same([filled(*part) for part in parts], parts)
    # as the README says: a text that names a file, or an address, is a text in a message
    texts = [filled(str(tmp_path / "third.png")), filled("https://example.org/third.png")]
    same(texts, [{"messages": messages} for messages in texts])
    # what embeds an answer ends before the end-of-turn token
    answer = [{"role": "assistant", "content": [{"type": "text", "text": "a star"}]}]
    plain = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}, *answer]
    same([filled(first, "what?") + answer], [{"messages": plain, "images": [first]}])
    system = [{"role": "system", "content": "Find this."}, {"role": "user", "content": "a star"}]
    found = theirs.encode(["a star"], prompt="Find this.", convert_to_tensor=True)
    torch.testing.assert_close(found, embed(model, processor, [{"messages": system}]), atol=1e-5, rtol=0)


@needs_sentence_transformers
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_sentence_transformers_saves_compares_and_refuses(exported, tmp_path, pooling):
    model = load(exported / pooling / "export", pooling)
    inputs = ["a red circle", *IMAGES]
    found = model.encode(inputs, convert_to_tensor=True)
    torch.testing.assert_close(model.similarity(found, found), found @ found.T)
    assert model.get_embedding_dimension() == 16
    model.save(str(tmp_path / "again"))
    again = load(tmp_path / "again", pooling).encode(inputs, convert_to_tensor=True)
    torch.testing.assert_close(again, found, atol=1e-6, rtol=0)
    # a pair is no document
    for pair in (["what?", IMAGES[0]], ("what?", "a star")):
        with pytest.raises(ValueError, match="query"):
            model.encode([pair])
    with pytest.raises(Exception, match="message"):
        model.encode([filled("a"), "b"])


@needs_sentence_transformers
def test_what_stock_modules_do_otherwise(exported):
    """The notes in the exported README, checked; the module of its own does none of it."""
    transparent = IMAGES[0].copy()
    transparent.putalpha(Image.fromarray(np.tile(np.arange(0, 240, 8, dtype=np.uint8), (30, 1))))
    sixteen_bit = Image.fromarray(np.random.RandomState(0).randint(0, 65535, (30, 30)).astype(np.uint16))
    turned = IMAGES[1].copy()
    turned.getexif()[0x0112] = 6
    for pooling in ("last", "mean"):
        model, processor = sugar(exported / pooling / "sugar")
        transparent.save(exported / "transparent.png")
        items = ["a star \n", sixteen_bit, turned, exported / "transparent.png"]
        theirs = load(exported / pooling / "export", pooling)
        inputs = [str(item) if isinstance(item, Path) else item for item in items]
        found = theirs.encode(inputs, batch_size=1, convert_to_tensor=True)
        distances = (found - embed(model, processor, items)).abs().amax(dim=1)
        assert (distances > 1e-3).all() if pooling == "last" else (distances < 1e-5).all(), distances
        if pooling == "last":
            stripped = embed(model, processor, ["a star"])
            torch.testing.assert_close(found[:1], stripped, atol=1e-5, rtol=0)
        theirs.max_seq_length = 6
        if pooling == "mean":
            with pytest.raises(ValueError, match="the limit is 6"):
                theirs.encode(["a red circle left of a star"])


@needs_sentence_transformers
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("family", ["llava_next", "idefics3", "gemma3"])
def test_other_families(tmp_path, family, pooling):
    """Image tokens at several resolutions; brackets after an image, which only the module of its own leaves out."""
    vlm, processor = tiny_backbones.build(family)
    model = SugarForConditionalGeneration.from_vlm(vlm, retrieval_dim=16, image_pooling=pooling).eval()
    processor = SugarProcessor.from_processor(processor)
    stock = export_sentence_transformers(model, processor, tmp_path)
    assert stock == (family == "llava_next" and pooling == "last")
    theirs = load(tmp_path, "last" if stock else "mean")
    documents = ["a red circle", *IMAGES]
    found = theirs.encode(documents, convert_to_tensor=True)
    torch.testing.assert_close(found, embed(model, processor, documents), atol=1e-5, rtol=0)
    parts = [["a", IMAGES[1]], [IMAGES[0], "b"], ["a", *IMAGES]]
    found = theirs.encode([filled(*part) for part in parts], convert_to_tensor=True)
    torch.testing.assert_close(found, embed(model, processor, parts), atol=1e-5, rtol=0)


@needs_sentence_transformers
def test_loads_where_this_library_is_not(exported, tmp_path):
    """In a process that cannot import it, with an empty module cache; without the flag the code is not run."""
    code = f"""
import sys
sys.modules["hf_sugar"] = None
import numpy
from PIL import Image
from sentence_transformers import SentenceTransformer
path = {str(exported / "mean" / "export")!r}
try:
    SentenceTransformer(path, device="cpu")
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise AssertionError("ran without the flag")
assert not any("sugar" in name for name in sys.modules if name != "hf_sugar")
model = SentenceTransformer(path, trust_remote_code=True, device="cpu")
image = Image.open({str(tmp_path / "image.png")!r})
numpy.save({str(tmp_path / "found.npy")!r}, model.encode(["a red circle", image]))
"""
    IMAGES[0].save(tmp_path / "image.png")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr[-2000:]
    model, processor = sugar(exported / "mean" / "sugar")
    expected = embed(model, processor, ["a red circle", IMAGES[0]])
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "found.npy")), expected, atol=1e-5, rtol=0)
