"""One wrapper, many families: tiny random models, and each family's own processor where it can be built."""

import json
import re
from types import SimpleNamespace

import pytest
import tiny
import tiny_backbones
import tiny_runs
import torch
from rows import filled
from safetensors.torch import load_file
from transformers import PaliGemmaProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.utils import is_torchvision_available

from hf_sugar import SugarForConditionalGeneration, SugarProcessor, SugarTrainer
from hf_sugar.training import SugarCollator
from hf_sugar.training.discriminative import ROW_COLUMNS
from hf_sugar.training.heads import embed_rows


# Text, an image, images side by side, several images in a sample; six images of six sizes and five shapes.
ITEMS = [
    ["a red circle"],
    [tiny.image(0, 40, 40)],
    ["a blue square", tiny.image(1, 30, 80), tiny.image(2, 50, 50), "left of a star"],
    [tiny.image(3, 60, 28), "what is this?"],
    [tiny.image(4, 30, 30), "a red star", tiny.image(5, 64, 60)],
]
PLACES = [(row, place, part) for row, item in enumerate(ITEMS) for place, part in enumerate(item)]
# What their processors need; the others are saved and loaded again.
NEEDS_TORCHVISION = set(
    "llava_next_video llava_onevision video_llava qwen2_vl qwen2_5_vl qwen3_vl smolvlm internvl mistral3".split()
)


CONVERSATIONS = [filled(*item) for item in ITEMS]


@pytest.fixture(scope="module", params=tiny_backbones.EVERY_FAMILY)
def backbone(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    raw, processor = tiny_backbones.build(request.param)
    raw.save_pretrained(path)
    if request.param not in NEEDS_TORCHVISION:
        processor.save_pretrained(path)
        processor = SugarProcessor.from_pretrained(path)
    return SimpleNamespace(
        family=request.param,
        path=path,
        raw=raw,
        processor=SugarProcessor.from_processor(processor),
        model=SugarForConditionalGeneration.from_backbone(path, retrieval_dim=16),
    )


@torch.no_grad()
def first_layer_inputs(raw, inputs) -> torch.Tensor:
    """What the language model reads: embeddings of the tokens, image features put in."""
    seen = []
    hook = raw.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].clone()), with_kwargs=True
    )
    raw.base_model(**{key: value for key, value in inputs.items() if key != "slice_ids"})
    hook.remove()
    return seen[0]


class TestBackbones:
    def test_weights_logits_loss_and_generation_are_the_backbones(self, backbone):
        raw, model = backbone.raw, backbone.model
        weights = model.vlm.state_dict()
        assert weights.keys() == raw.state_dict().keys()
        for name, weight in raw.state_dict().items():
            assert torch.equal(weights[name], weight), name

        inputs = backbone.processor.encode_conversations(CONVERSATIONS, padding_side="left")
        plain = {key: value for key, value in inputs.items() if key != "slice_ids"}
        with torch.no_grad():
            expected = raw(**plain, labels=plain["input_ids"])
            output = model(**inputs, labels=plain["input_ids"])
        assert torch.equal(output.logits, expected.logits)
        assert torch.equal(output.loss, expected.loss)
        expected = raw.generate(**plain, max_new_tokens=4, do_sample=False)
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), expected)

    def test_export_has_the_tensors_of_the_raw_checkpoint(self, backbone, tmp_path):
        backbone.model.export_backbone(tmp_path)
        raw, ours = (load_file(path / "model.safetensors") for path in (backbone.path, tmp_path))
        assert ours.keys() == raw.keys() and all(torch.equal(ours[name], raw[name]) for name in raw)

    def test_the_processor_round_trip(self, backbone, tmp_path):
        if backbone.family in NEEDS_TORCHVISION:
            pytest.skip("this family's processor is not loaded without torchvision")
        backbone.processor.save_pretrained(tmp_path)
        processors = backbone.processor, SugarProcessor.from_pretrained(tmp_path)
        before, after = (processor.embed_inputs(ITEMS) for processor in processors)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)

    def test_an_image_is_the_mean_over_exactly_its_own_tokens(self, backbone):
        """Which tokens are an image's is found without the processor's marks: those whose input changes with its
        pixels, and the learnt newline that some families put after a row of them."""
        raw, model, processor = backbone.raw, backbone.model, backbone.processor
        inputs = processor.embed_inputs(ITEMS)
        before = first_layer_inputs(raw, inputs)
        newline = getattr(raw.base_model, "image_newline", None)
        is_newline = torch.zeros(before.shape[:2], dtype=torch.bool)
        if newline is not None:
            is_newline = (before == newline).all(dim=-1)
            assert is_newline.any()
        with torch.no_grad():
            embeddings = model(**inputs).embeddings
            hidden = raw.base_model(**{key: value for key, value in inputs.items() if key != "slice_ids"})[0]

        for row, place, image in PLACES:
            if isinstance(image, str):
                continue
            items = [list(item) for item in ITEMS]
            items[row][place] = tiny.image(100 + place, image.height, image.width)
            changed = (first_layer_inputs(raw, processor.embed_inputs(items)) != before).any(dim=-1)
            assert changed[row].any() and not changed[torch.arange(len(ITEMS)) != row].any()
            mine = changed[row].clone()
            for token in is_newline[row].nonzero().flatten().tolist():
                mine[token] = mine[token - 1]
            assert torch.equal(mine, inputs["slice_ids"][row] == place)
            expected = model.retrieval_projector(hidden[row, mine].mean(dim=0, keepdim=True))[0]
            expected = torch.nn.functional.normalize(expected, dim=-1)
            torch.testing.assert_close(embeddings[row, place], expected, atol=1e-5, rtol=0)

    def test_a_text_marks_its_last_token(self, backbone):
        inputs = backbone.processor.embed_inputs(ITEMS)
        for row, place, part in PLACES:
            if isinstance(part, str):
                [token] = (inputs["slice_ids"][row] == place).nonzero().flatten().tolist()
                assert backbone.processor.tokenizer.decode(inputs["input_ids"][row, : token + 1]).endswith(part)

    def test_padding_side_and_batch_do_not_matter(self, backbone):
        model, processor = backbone.model, backbone.processor
        with torch.no_grad():
            right = model(**processor.encode_conversations(CONVERSATIONS)).embeddings
            left = model(**processor.encode_conversations(CONVERSATIONS, padding_side="left")).embeddings
            torch.testing.assert_close(left, right, atol=1e-5, rtol=0)
            for row, alone in enumerate(CONVERSATIONS):
                alone = model(**processor.encode_conversations([alone])).embeddings[0]
                torch.testing.assert_close(alone, right[row, : len(alone)], atol=1e-5, rtol=0)

    def test_a_prefix_embedding_is_that_of_the_prefix_alone(self, backbone):
        model, processor = backbone.model, backbone.processor
        for item in (ITEMS[2], ITEMS[4]):
            with torch.no_grad():
                whole = model(**processor.embed_inputs([item])).embeddings[0]
                for length in range(1, len(item) + 1):
                    alone = model.embed(**processor.embed_inputs([item[:length]]))[0]
                    images = sum(not isinstance(part, str) for part in item[:length])
                    if backbone.family == "llava_onevision" and images == 1:
                        # the family itself: an image is cut into tiles only where it is the only one of its sample
                        assert (whole[length - 1] - alone).abs().max() > 1e-3
                        continue
                    torch.testing.assert_close(whole[length - 1], alone, atol=1e-5, rtol=0)

    def test_the_loss_is_on_the_answer_and_what_ends_it(self, backbone):
        answer = filled("a red circle", tiny.image(0), "a blue star")[0]["content"]
        messages = filled(*ITEMS[3]) + [{"role": "assistant", "content": answer}]
        inputs = backbone.processor.encode_conversations([messages, filled("a red")], ["answers", None])
        labels = inputs["labels"][0]
        learnt = backbone.processor.tokenizer.decode(labels[labels >= 0])
        # one special token at the end, and none of those before and after the image
        assert re.fullmatch(r" ?a red circle ?a blue star\s?<[^<>]+>", learnt)
        assert (inputs["labels"][1] == -100).all()

    def test_gradients_reach_the_projector_the_language_model_and_the_images(self, backbone):
        model = backbone.model.train()
        embeddings = model(**backbone.processor.embed_inputs(ITEMS)).embeddings
        (embeddings * torch.arange(embeddings.shape[-1])).sum().backward()
        weights = dict(model.retrieval_projector.named_parameters())
        decoder = dict(model.vlm.get_decoder().named_parameters())
        weights |= {name: weight for name, weight in decoder.items() if "q_proj" in name or "v_proj" in name}
        named = model.vlm.named_parameters()
        tower = [weight for name, weight in named if re.search("vision_tower|vision_model|visual|image_tower", name)]
        touched = {name: weight.grad is not None and bool(weight.grad.any()) for name, weight in weights.items()}
        seen = [weight for weight in tower if weight.grad is not None and weight.grad.any()]
        model.zero_grad()
        model.eval()
        assert len(weights) > 4 and all(touched.values()), touched
        assert len(seen) > len(tower) / 2

    @pytest.mark.parametrize("singles", (1, 2))  # some of the images, or all
    def test_slices_alone_beside_their_rows(self, backbone, singles):
        """As `embed` has them, also where a row of several images gives other features than an image alone."""
        items = [("a", *ITEMS[1], "b", ITEMS[2][1]), ("c", "d"), ("e", ITEMS[2][2], "f", ITEMS[3][0])]
        rows = [{"messages": filled(*item), "loss_on": "text"} for item in items]
        for row, item in zip(rows, items):
            row["images"] = [part for part in item if not isinstance(part, str)]
        processor, model = backbone.processor, backbone.model.eval()
        batch = SugarCollator(processor, embed_slices=lambda slices: torch.ones(len(slices), 2), singles=singles)(rows)
        inputs = {name: value for name, value in batch.items() if name not in (*ROW_COLUMNS, "labels")}
        with torch.no_grad():
            _, found = embed_rows(model, **inputs)
            for embedding, (row, column) in zip(found, (batch["single_slices"] > 0).nonzero(), strict=True):
                item = items[row][batch["single_slices"][row, column]]
                assert torch.allclose(embedding, model.embed(**processor.embed_inputs([item]))[0], atol=1e-5)

    def test_trains(self, backbone, tmp_path, teachers):
        # images in tiles, images of any size, images that are several runs of tokens
        if backbone.family not in ("llava_next", "qwen2_5_vl", "idefics3"):
            pytest.skip("the test of gradients says as much")
        model = SugarForConditionalGeneration.from_backbone(backbone.path, retrieval_dim=16)
        data = tiny_runs.rows([tiny_runs.conversation, tiny_runs.caption, tiny_runs.story], 6)
        config = tiny_runs.config(tmp_path, teachers, structure_weight=0.5, max_steps=2, max_length=512)
        trainer = SugarTrainer(model, config, train_dataset=data, processing_class=backbone.processor)
        trainer.train()
        losses = tiny_runs.history(trainer, "structure_loss") + tiny_runs.history(trainer, "generative_loss")
        assert len(losses) == 4 and all(0 < loss < 100 for loss in losses)
        before = backbone.model.state_dict()
        changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
        for name in ("retrieval_projector.linear_2.weight", "layers.1.self_attn.q_proj.weight"):
            assert any(key.endswith(name) for key in changed), name


class TestProcessors:
    @pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
    @pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm", "internvl"])
    @pytest.mark.parametrize("video_file", [False, True])
    def test_missing_torchvision_is_named(self, family, video_file, tmp_path):
        raw, processor = tiny_backbones.build(family)
        for thing in (raw.config, processor.tokenizer, processor.image_processor):
            thing.save_pretrained(tmp_path)
        name = "SmolVLMProcessor" if family == "smolvlm" else type(processor).__name__
        (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": name}))
        if video_file:
            kind = name.replace("Processor", "VideoProcessor").replace("Qwen2_5_VL", "Qwen2VL")
            (tmp_path / "video_preprocessor_config.json").write_text(json.dumps({"video_processor_type": kind}))
        with pytest.raises(ImportError, match="needs torchvision.*pip install torchvision"):
            SugarProcessor.from_pretrained(tmp_path)

    def test_other_errors_stay_as_they_are(self, tmp_path):
        with pytest.raises((OSError, ValueError)) as caught:
            SugarProcessor.from_pretrained(tmp_path)
        assert "torchvision" not in str(caught.value)

    def test_feature_tokens_in_a_text_are_refused(self):
        _, processor = tiny_backbones.build("gemma3")
        processor = SugarProcessor.from_processor(processor)
        for token in ("<start_of_image>", "<image_soft_token>"):
            with pytest.raises(ValueError, match=f"contains '{token}', a special token"):
                processor.embed_inputs([f"a {token} b"])

    def test_a_processor_that_adds_to_the_text_is_refused(self):
        images = SiglipImageProcessorPil(size={"height": 28, "width": 28})
        images.image_seq_length = 4
        tokens = tiny_backbones.tokenizer(image_token="<image>")
        processor = SugarProcessor.from_processor(PaliGemmaProcessor(images, tokens))
        with pytest.raises(ValueError, match=r"items\[0\]: .*PaliGemmaProcessor.* adds to the text"):
            processor.embed_inputs([[tiny.image(0), "a red circle"]])
