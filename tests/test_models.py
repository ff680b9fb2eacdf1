import pickle
from base64 import b64encode
from copy import deepcopy
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from unittest.mock import Mock

import pytest
import tiny
import torch
from huggingface_hub import constants
from transformers import AutoImageProcessor, AutoProcessor, logging

from hf_sugar import SugarConfig, SugarForConditionalGeneration, SugarProcessor
from hf_sugar.models.modeling_sugar import pool_slices
from hf_sugar.models.processing_sugar import SLICE_TEMPLATE


@pytest.fixture(scope="module")
def raw():
    return tiny.llava()


@pytest.fixture(scope="module")
def raw_dir(raw, tmp_path_factory):
    path = tmp_path_factory.mktemp("llava")
    raw.save_pretrained(path)
    tiny.processor().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def model(raw_dir):
    return SugarForConditionalGeneration.from_pretrained(raw_dir, retrieval_dim=16)


@pytest.fixture(scope="module")
def processor(raw_dir):
    return SugarProcessor.from_pretrained(raw_dir)


ITEMS = [
    "a red circle",
    tiny.image(0),
    ["a blue square", tiny.image(1), tiny.image(2), "left of a star é"],
    [tiny.image(3), "what is this?"],
]


class TestModel:
    def test_logits_are_the_backbones_bit_for_bit(self, raw, model, processor):
        inputs = processor.embed_inputs(ITEMS)
        slice_ids = inputs.pop("slice_ids")
        expected = raw(**inputs, labels=inputs["input_ids"])
        for kwargs in ({}, {"slice_ids": slice_ids}):
            output = model(**inputs, labels=inputs["input_ids"], **kwargs)
            assert torch.equal(output.logits, expected.logits)
            assert torch.equal(output.loss, expected.loss)

    @pytest.mark.parametrize("asked", [None, True, 1, 0, [0], [-1], [1, 3], [9]])
    def test_hidden_states_are_those_asked_for_and_embeddings_do_not_depend_on_them(
        self, raw, model, processor, asked
    ):
        # in 5.24.0 the vision tower of the stock class fails where its last layer is not asked for
        inputs = processor.embed_inputs(ITEMS if asked is None or asked is True else ["a red circle"])
        plain = {key: value for key, value in inputs.items() if key != "slice_ids"}
        with torch.no_grad():
            expected = raw(**plain, output_hidden_states=asked)
            output = model(**inputs, output_hidden_states=asked)
            embeddings = model.embed_slices(**inputs)[0]
        assert torch.equal(output.logits, expected.logits)
        torch.testing.assert_close(output.embeddings, embeddings, atol=1e-6, rtol=0)  # of rows without padding
        assert (output.hidden_states is None) == (expected.hidden_states is None)
        for ours, theirs in zip(output.hidden_states or (), expected.hidden_states or (), strict=True):
            assert ours is theirs is None or torch.equal(ours, theirs)

    def test_fields_have_their_names_in_every_version_of_transformers(self, model, processor):
        inputs = processor.embed_inputs(ITEMS)
        with torch.no_grad():
            output = model(**inputs, use_cache=True)
            text = model(**processor.embed_inputs(["a red circle"]))
            features = torch.cat(list(model.get_image_features(inputs["pixel_values"]).pooler_output))
        assert output.past_key_values is output["past_key_values"] is output.get("past_key_values")
        assert output.past_key_values.get_seq_length() == inputs["input_ids"].shape[1]
        assert torch.equal(output.image_hidden_states, features)
        assert torch.equal(output.get("image_hidden_states"), features)
        assert text.image_hidden_states is text.get("image_hidden_states") is None
        if output.image_outputs is not None:  # from transformers 5.24 on
            assert torch.equal(torch.cat(list(output.image_outputs.pooler_output)), features)

    @pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 20}])
    def test_generates_the_same_tokens(self, raw, model, processor, kwargs):
        inputs = processor.embed_inputs([["what is this?", tiny.image(5)], [tiny.image(6), "a red"]])
        inputs.pop("slice_ids")
        torch.manual_seed(0)
        expected = raw.generate(**inputs, max_new_tokens=8, **kwargs)
        torch.manual_seed(0)
        assert torch.equal(model.generate(**inputs, max_new_tokens=8, **kwargs), expected)

    def test_embeddings_are_the_projected_means_of_exactly_their_tokens(self, raw, model, processor):
        inputs = processor.embed_inputs([ITEMS[2]])
        ids, decode = inputs["input_ids"][0].tolist(), processor.tokenizer.decode
        # found by counting, not by the processor's marks: four tokens an image of 28 pixels in patches of 14
        places = [i for i, token in enumerate(ids) if token == 4]
        first, last = (
            next(i for i in range(start, len(ids)) if decode(ids[: i + 1]).endswith(text))
            for start, text in ((0, "a blue square"), (places[-1], "left of a star é"))
        )
        assert first < places[0] and len(places) == 8
        with torch.no_grad():
            embeddings = model(**inputs).embeddings[0]
            inputs.pop("slice_ids")
            hidden = raw.model(**inputs).last_hidden_state[0]
            pooled = [hidden[first], hidden[places[:4]].mean(0), hidden[places[4:]].mean(0), hidden[last]]
            expected = torch.nn.functional.normalize(model.retrieval_projector(torch.stack(pooled)), dim=-1)
        torch.testing.assert_close(embeddings, expected, atol=1e-6, rtol=0)

    def test_embed_is_the_last_slice_of_forward_and_skips_the_lm_head(self, model, processor):
        inputs = processor.embed_inputs(ITEMS)
        with torch.no_grad():
            output = model(**inputs)
            calls = []
            hook = model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
            embedded = model.embed(**inputs)
            hook.remove()
        last = output.embedding_mask.sum(1) - 1
        assert last.tolist() == [0, 0, 3, 1]
        torch.testing.assert_close(embedded, output.embeddings[torch.arange(4), last], atol=1e-6, rtol=0)
        assert not calls
        torch.testing.assert_close(embedded.norm(dim=1), torch.ones(4))

    def test_full_checkpoint_round_trip(self, model, processor, tmp_path):
        model.config.backbone_name_or_path = "elsewhere"  # of an adapter that is off by now
        model.save_pretrained(tmp_path)
        again = SugarForConditionalGeneration.from_pretrained(tmp_path)
        assert isinstance(again.config, SugarConfig)
        inputs = processor.embed_inputs(ITEMS)
        assert torch.equal(again.embed(**inputs), model.embed(**inputs))

    def test_saving_leaves_the_new_one_or_the_old_one(self, model, tmp_path, monkeypatch):
        model.save_pretrained(tmp_path, max_shard_size="100KB")
        (tmp_path / "notes.txt").touch()
        old = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
        with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
            patch.setattr(type(model.config), "save_pretrained", Mock(side_effect=OSError("disk full")))
            deepcopy(model).save_pretrained(tmp_path)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == old
        model.save_pretrained(tmp_path)
        names = {file.name for file in tmp_path.iterdir() if file.suffix != ".py"}
        assert names == {"config.json", "generation_config.json", "model.safetensors", "notes.txt"}

    def test_last_pooling_uses_the_last_image_token(self):
        hidden = torch.arange(12.0).view(1, 6, 2)
        slice_ids = torch.tensor([[-1, 0, 0, 0, 1, -1]])
        mean, mask = pool_slices(hidden, slice_ids)
        last, _ = pool_slices(hidden, slice_ids, "last")
        assert mean[0].tolist() == [[4.0, 5.0], [8.0, 9.0]]
        assert last[0].tolist() == [[6.0, 7.0], [8.0, 9.0]]
        assert mask.tolist() == [[1, 1]]

    def test_unknown_image_pooling(self, raw):
        with pytest.raises(ValueError, match="image_pooling.*'mean' or 'last'"):
            SugarForConditionalGeneration.from_vlm(raw, image_pooling="max")


class TestProcessor:
    def test_is_the_backbones_own_processor_too(self, processor, raw_dir, tmp_path):
        stock = type(AutoProcessor.from_pretrained(raw_dir))
        assert isinstance(processor, stock) and isinstance(processor, SugarProcessor)
        processor.save_pretrained(tmp_path)
        again = AutoProcessor.from_pretrained(tmp_path)  # registered: no flag, no prompt
        assert isinstance(again, SugarProcessor) and isinstance(again, stock)
        assert type(stock.from_pretrained(tmp_path)) is stock
        copy = pickle.loads(pickle.dumps(processor))
        assert torch.equal(copy.embed_inputs(ITEMS)["input_ids"], processor.embed_inputs(ITEMS)["input_ids"])

    def test_saved_and_loaded_by_the_class_of_an_instance(self, raw_dir, tmp_path):
        processor = SugarProcessor.from_pretrained(raw_dir)
        before = processor.to_dict()
        for name in ("first", "second"):
            processor.chat_template = "{# mine, which drops all images #}"
            processor.save_pretrained(tmp_path / name)
            processor = type(processor).from_pretrained(tmp_path / name)
            assert processor.to_dict() == before
            assert processor.chat_template == "{# mine, which drops all images #}"
        again = AutoImageProcessor.from_pretrained(tmp_path / "second")
        assert repr(again) == repr(processor.image_processor)  # no code is named in the parts

    def test_template_that_reorders_is_replaced_and_one_that_does_not_is_kept(self, raw_dir):
        assert SugarProcessor.from_pretrained(raw_dir).chat_template == SLICE_TEMPLATE
        kept = SLICE_TEMPLATE.replace("USER", "HUMAN") + "{# mine #}"
        assert SugarProcessor.from_processor(tiny.processor(chat_template=kept)).chat_template == kept
        none = SugarProcessor.from_processor(tiny.processor(chat_template=None))
        assert none.chat_template == SLICE_TEMPLATE

    def test_replaced_template_agrees_with_llavas_where_that_keeps_the_order(self, processor):
        messages = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "a star"}]},
            {"role": "user", "content": [{"type": "text", "text": "where?"}]},
        ]
        ours = processor.apply_chat_template(messages, add_generation_prompt=True)
        theirs = processor.apply_chat_template(messages, chat_template=tiny.LLAVA_TEMPLATE, add_generation_prompt=True)
        assert ours == theirs.replace("a star ", "a star</s>")

    def test_tokens_are_those_of_the_chat_template(self, processor):
        content = [{"type": "image", "image": tiny.image()}, {"type": "text", "text": "what is this?"}]
        messages = [[{"role": "user", "content": content}]]
        expected = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        found = processor.encode_conversations(messages)
        assert torch.equal(found["input_ids"], expected["input_ids"])
        assert torch.equal(found["pixel_values"], expected["pixel_values"])

    def test_adjacent_images_are_two_slices(self):
        """With nothing between them they are one run of image tokens."""
        template = SLICE_TEMPLATE.replace("<image>\n", "<image>")
        glued = SugarProcessor.from_processor(tiny.processor(chat_template=template))
        slice_ids = glued.embed_inputs([[tiny.image(1), tiny.image(2)]])["slice_ids"][0]
        assert slice_ids[slice_ids >= 0].tolist() == [0] * 4 + [1] * 4

    def test_labels(self, processor):
        decode = processor.tokenizer.decode
        messages = [
            {"role": "system", "content": [{"type": "text", "text": "be brief"}]},
            {"role": "user", "content": [{"type": "image", "image": tiny.image()}, {"type": "text", "text": "what?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "a star"}]},
            {"role": "user", "content": [{"type": "text", "text": "where?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "left"}]},
        ]

        def learnt(loss_on):
            labels = processor.encode_conversations([messages], [loss_on])["labels"][0]
            return decode(labels[labels != -100]).replace("</s>", "|").replace(" ", "")

        assert learnt("answers") == "astar|left|"
        assert learnt("text") == "what?astar|where?left|"
        assert learnt("captions") == "what?"
        nothing = processor.encode_conversations([messages], [None])["labels"]
        assert (nothing == -100).all()
        # system text is no slice
        assert processor.encode_conversations([messages])["slice_ids"].max() == 4

    def test_text_that_looks_like_the_template_does_not_confuse_the_marks(self, processor):
        item = ["USER: ASSISTANT: a", tiny.image(), "USER:", "USER:"]
        inputs = processor.embed_inputs([item])
        ids, slice_ids = inputs["input_ids"][0], inputs["slice_ids"][0]
        ends = [int((slice_ids == n).nonzero()[-1]) for n in (0, 2, 3)]
        assert processor.tokenizer.decode(ids[: ends[0] + 1]) == "USER: USER: ASSISTANT: a"
        assert processor.tokenizer.decode(ids[ends[0] + 1 : ends[1] + 1]).endswith("\nUSER:")
        assert processor.tokenizer.decode(ids[ends[1] + 1 : ends[2] + 1]) == " USER:"

    def test_items(self, processor, tmp_path):
        path = tmp_path / "picture.png"
        tiny.image(9).save(path)
        image = {"type": "image", "image": str(path)}
        row = {"messages": [{"role": "user", "content": [{"type": "image"}]}], "images": [path]}
        batch = processor.embed_inputs([tiny.image(9), path, [path], image, [image], row])
        assert all(torch.equal(batch["input_ids"][0], ids) for ids in batch["input_ids"])
        assert all(torch.equal(batch["pixel_values"][0], pixels) for pixels in batch["pixel_values"])
        for item in ("redcircle", tiny.image(9), path, image, row):
            alone, listed = processor.embed_inputs(item), processor.embed_inputs([item])
            assert all(torch.equal(alone[key], listed[key]) for key in listed)

    def test_a_str_is_always_a_text(self, processor, tmp_path, monkeypatch, caplog):
        monkeypatch.chdir(tmp_path)
        tiny.image(9).save("picture.png")
        logging.enable_propagation()
        try:
            batch = processor.embed_inputs(["picture.png", "http://127.0.0.1/picture.png", "nowhere.png"])
        finally:
            logging.disable_propagation()
        assert "pixel_values" not in batch
        assert [record.getMessage() for record in caplog.records] == [
            "items[0]: 'picture.png' is taken as a text; for the image in that file, give its `Path`."
        ]

    def test_an_image_at_an_address_is_that_of_the_file(self, processor, tmp_path, monkeypatch):
        clear = tiny.image(1).convert("RGBA")
        clear.putalpha(0)
        clear.save(tmp_path / "clear.png")
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path))
        Thread(target=server.serve_forever, daemon=True).start()

        def pixels(url):
            return processor.embed_inputs([{"type": "image", "url": url}])["pixel_values"]

        address = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(ValueError, match=r"items\[0\], images\[0\]: the image 'http.*offline mode"):
            pixels(f"{address}/clear.png")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        found = pixels(f"{address}/clear.png")
        with pytest.raises(ValueError, match="404"):
            pixels(f"{address}/none.png")
        server.shutdown()
        expected = pixels(tmp_path / "clear.png")
        assert torch.equal(found, expected)
        data = b64encode((tmp_path / "clear.png").read_bytes()).decode()
        assert torch.equal(pixels(f"data:image/png;base64,{data}"), expected)

    @pytest.mark.parametrize(
        "item, message",
        [
            ("  ", r"items\[1\] is empty or holds an empty text"),
            ([], r"items\[1\] is an empty list"),
            (["a", ""], r"items\[1\] is empty or holds an empty text"),
            (Path("nowhere.jpg"), r"items\[1\]: the file 'nowhere.jpg' does not exist"),
            (Path(__file__), r"items\[1\], images\[0\]: the image '.*test_models.py' cannot be read"),
            ({"type": "image"}, r"items\[1\] is or holds a part with the keys type; give a text"),
            (3, r"items\[1\] is or holds int; give a text"),
            ({"type": "video", "video": "a.mp4"}, r"is or holds a part with the keys type, video; give a text"),
            ("an <image> here", r"items\[1\]: the text 'an <image> here' contains '<image>', a special token"),
            (["a", "b</s>"], r"items\[1\]: the text 'b</s>' contains '</s>', a special token"),
            ({"messages": [{"role": "bot", "content": "a"}]}, r"items\[1\], `messages\[0\].role`: is 'bot'"),
            ({"messages": None}, r"items\[1\], `messages`: is not a list"),
            (
                {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
                r"holds 0 images but `messages` has 1 image parts",
            ),
        ],
    )
    def test_bad_items_are_named(self, processor, item, message):
        with pytest.raises((TypeError, ValueError), match=message):
            processor.embed_inputs(["good", item])

    def test_bad_calls(self, processor):
        with pytest.raises(ValueError, match="There are no items to embed"):
            processor.embed_inputs([])
        message = r"items\[1\] has \d+ tokens after its 2 image\(s\) are expanded; the limit is 12"
        with pytest.raises(ValueError, match=message):
            processor.embed_inputs(["a", [tiny.image(), tiny.image()]], max_length=12)

    def test_template_that_reorders_by_hand(self, processor):
        stock = SugarProcessor.from_processor(tiny.processor())
        stock.chat_template = tiny.LLAVA_TEMPLATE
        with pytest.raises(ValueError, match="drops or reorders parts"):
            stock.embed_inputs([["text first", tiny.image()]])
