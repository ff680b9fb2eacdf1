import math
import warnings

import pytest
import tiny
import torch
from datasets import Dataset, Features, Image, List, Value
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from hf_sugar import SugarProcessor, SugarTrainer, SugarTrainingConfig
from hf_sugar.alignment import IMAGE, TEXT, label_matrix
from hf_sugar.cli.train import EstimatedTrainingConfig
from hf_sugar.teachers import TripleEncoder, add_teacher_embeddings
from hf_sugar.training import SugarCollator


FEATURES = Features(
    {
        "messages": [{"role": Value("string"), "content": [{"type": Value("string"), "text": Value("string")}]}],
        "images": List(Image()),
        "loss_on": Value("string"),
        "id": Value("string"),
    }
)
COMMON = dict(
    per_device_train_batch_size=4,
    per_device_eval_batch_size=4,
    bf16=False,
    use_cpu=True,
    gradient_checkpointing=False,
    report_to=[],
    save_strategy="no",
    logging_steps=1,
    disable_tqdm=True,
    seed=7,
    max_steps=4,
    learning_rate=1e-2,
)


# the paper's loss and labels, and this library's first way of training captions alone
PAPER = dict(discriminative_loss="structure", label_calibration="none", flip_captions=True)


def image_part():
    return {"type": "image", "text": None}


def text_part(text):
    return {"type": "text", "text": text}


def conversation(i):
    user = {"role": "user", "content": [image_part(), text_part(f"what is this {i % 3}?")]}
    return [user, {"role": "assistant", "content": [text_part(f"a red circle {i}")]}]


def caption(i):
    return [{"role": "user", "content": [image_part(), text_part(f"a blue square {i}")]}]


def story(i):
    parts = [p for k in range(2 + i % 2) for p in (text_part(f"step {k} of {i}"), image_part())]
    return [{"role": "user", "content": parts}]


def rows(makers, n=12):
    data = []
    for i in range(n):
        make = makers[i % len(makers)]
        messages = make(i)
        count = sum(part["type"] == "image" for message in messages for part in message["content"])
        loss_on = {"caption": "captions", "story": "text"}.get(make.__name__, "answers")
        images = [tiny.image(10 * i + k) for k in range(count)]
        data.append({"messages": messages, "images": images, "loss_on": loss_on, "id": f"row-{i}"})
    return Dataset.from_list(data, features=FEATURES)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    path = tmp_path_factory.mktemp("llava")
    tiny.llava().save_pretrained(path)
    tiny.processor().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    path = tmp_path_factory.mktemp("teachers")
    return tiny.teachers(path)


def config(path, teachers=None, **kwargs):
    return SugarTrainingConfig(output_dir=str(path), **{**COMMON, "retrieval_dim": 16, "teachers": teachers, **kwargs})


def history(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


class TestSftEquality:
    @pytest.mark.parametrize("lora", [False, True])
    @pytest.mark.parametrize("accumulation", [1, 2])
    def test_weight_zero_is_sft_to_the_last_bit(self, backbone, tmp_path, lora, accumulation):
        """TRL's own trainer on the plain LLaVA class, with the same rows, seed, chat template and masking."""
        data = rows([conversation])
        kwargs = {**COMMON, "gradient_accumulation_steps": accumulation, "lr_scheduler_type": "cosine"}
        peft = {"target_modules": r".*language_model.*q_proj", "r": 4}
        ours = SugarTrainer(
            backbone,
            SugarTrainingConfig(str(tmp_path / "a"), structure_weight=0.0, warmup_steps=0.03, **kwargs),
            train_dataset=data,
            peft_config=LoraConfig(**peft) if lora else None,
        )
        ours.train()
        theirs = SFTTrainer(
            backbone,
            SFTConfig(str(tmp_path / "b"), max_length=None, assistant_only_loss=True, warmup_steps=0.03, **kwargs),
            train_dataset=data,
            processing_class=SugarProcessor.from_pretrained(backbone),
            peft_config=LoraConfig(**peft) if lora else None,
        )
        theirs.train()
        assert history(ours, "loss") == history(theirs, "loss")
        assert history(ours, "grad_norm") == history(theirs, "grad_norm")
        assert len(history(ours, "loss")) == 4


class TestStructureLoss:
    def test_trains_and_logs_both_losses(self, backbone, teachers, tmp_path):
        trainer = SugarTrainer(
            backbone,
            config(tmp_path, teachers, max_steps=3, eval_strategy="steps", eval_steps=3),
            train_dataset=rows([conversation, caption, story]),
            eval_dataset=rows([caption], 6),
            peft_config=LoraConfig(r=4),
        )
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        assert any("retrieval_projector" in name for name in before)
        assert not any("vision_tower" in name or "multi_modal_projector" in name for name in before)
        trainer.train()
        for name, parameter in trainer.model.named_parameters():
            if name in before:
                assert not torch.equal(parameter, before[name]), f"{name} was not trained"
        names = ("generative_loss", "structure_loss", "contrastive_loss", "loss")
        for g, d, c, total in zip(*(history(trainer, k) for k in names)):
            assert total == pytest.approx(g + 0.01 * (d + 40 * c), rel=1e-3)
        evaluation = next(e for e in trainer.state.log_history if "eval_loss" in e)
        assert evaluation["eval_structure_loss"] > 0
        assert any("eval_image_to_text_recall@1" in e for e in trainer.state.log_history)

    def test_loss_is_the_label_matrix_against_the_cosines(self, backbone, teachers, tmp_path):
        """The logged value, computed again from the model's and the teachers' embeddings of every prefix."""
        data = rows([conversation, story], 4)
        trainer = SugarTrainer(
            backbone,
            config(tmp_path, teachers, **PAPER, positions_per_sample=99, max_steps=1, learning_rate=0.0),
            train_dataset=data,
        )
        trainer.train()
        [logged] = history(trainer, "structure_loss")

        model, processor = trainer.model.eval(), trainer.processing_class
        documents = []
        for row in data:
            images = iter(row["images"])
            parts = [part for message in row["messages"] for part in message["content"]]
            documents.append([next(images) if part["type"] == "image" else part["text"] for part in parts])
        assert all(
            "model" not in vars(teacher) for teacher in trainer._encoder._teachers
        )  # their memory is the training's
        embeddings, prefixes = [], []
        for d, (row, document) in enumerate(zip(data, documents)):
            filled = [{"role": m["role"], "content": [dict(part) for part in m["content"]]} for m in row["messages"]]
            images = iter(row["images"])
            for message in filled:
                for part in message["content"]:
                    if part["type"] == "image":
                        part["image"] = next(images)
            with torch.no_grad():
                embeddings.append(model(**processor.encode_conversations([filled])).embeddings[0])
            prefixes += [(d, n + 1) for n in range(len(document))]
        items = [item for document in documents for item in document]
        labels, _ = label_matrix(
            trainer._encoder.encode(items),
            torch.tensor([0, *torch.tensor([len(document) for document in documents]).cumsum(0)]),
            torch.tensor(prefixes),
            modality=torch.tensor([TEXT if isinstance(item, str) else IMAGE for item in items]),
            split=trainer._split,
        )
        vectors = torch.cat(embeddings).double()
        expected = ((vectors @ vectors.T - labels.double()) ** 2).sum() / len(vectors)
        assert logged == pytest.approx(expected.item(), rel=1e-4)

    @pytest.mark.parametrize(
        "kwargs",
        [
            {"gradient_checkpointing": True},
            {"bf16": True},
            {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
            {"label_kernel": "mean"},
            {"image_pooling": "last", "label_normalization": "none", "structure_reduction": "mean"},
        ],
        ids=str,
    )
    def test_settings(self, backbone, teachers, tmp_path, kwargs):
        trainer = SugarTrainer(
            backbone,
            config(tmp_path, teachers, max_steps=2, **kwargs),
            train_dataset=rows([conversation, caption, story]),
            peft_config=LoraConfig(r=4),
        )
        before = trainer.model.get_base_model().retrieval_projector.modules_to_save["default"].linear_1.weight.clone()
        trainer.train()
        after = trainer.model.get_base_model().retrieval_projector.modules_to_save["default"].linear_1.weight
        assert not torch.equal(before, after)
        assert all(value > 0 for value in history(trainer, "structure_loss"))

    def test_checkpointing_and_accumulation_change_nothing(self, backbone, teachers, tmp_path):
        def losses(**kwargs):
            trainer = SugarTrainer(
                backbone,
                config(tmp_path, teachers, flip_captions=False, positions_per_sample=99, **kwargs),
                train_dataset=rows([conversation, story]),
            )
            trainer.train()
            return history(trainer, "generative_loss"), history(trainer, "structure_loss")

        plain, checkpointed = losses(), losses(gradient_checkpointing=True)
        for a, b in zip(plain, checkpointed):
            assert a == pytest.approx(b, rel=1e-4)
        # with no learning, the generative loss of a batch is that of its halves accumulated
        whole = losses(learning_rate=0.0, max_steps=2)[0]
        halves = losses(learning_rate=0.0, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2)[
            0
        ]
        assert whole == pytest.approx(halves, rel=1e-4)

    def test_streaming_with_online_teachers(self, backbone, teachers, tmp_path):
        stream = rows([conversation, caption]).to_iterable_dataset()
        trainer = SugarTrainer(
            backbone, config(tmp_path, teachers, teacher_mode="online", max_steps=2), train_dataset=stream
        )
        trainer.train()
        assert len(history(trainer, "structure_loss")) == 2
        with pytest.raises(ValueError, match="streaming.*teacher_mode='online'"):
            SugarTrainer(backbone, config(tmp_path, teachers), train_dataset=stream)

    def test_rows_of_similar_length_share_a_batch_when_asked(self, backbone, teachers, tmp_path):
        data = rows([conversation, story], 160)
        trainer = SugarTrainer(
            backbone,
            config(tmp_path, teachers, train_sampling_strategy="group_by_length"),
            train_dataset=data,
            eval_dataset=data.select(range(6)),
        )
        batches = [batch["slice_modality"] for batch in trainer.get_train_dataloader()]
        # conversations have three slices, stories four or more
        mixed = sum((batch[:, 3:] >= 0).any(1).unique().numel() > 1 for batch in batches)
        assert len(batches) == 40 and mixed <= 10
        assert len(list(trainer.get_eval_dataloader())) >= 1

    def test_clip_alone(self, backbone, teachers, tmp_path):
        trainer = SugarTrainer(
            backbone, config(tmp_path, {"cross": teachers["cross"]}, max_steps=1), train_dataset=rows([story])
        )
        trainer.train()
        assert history(trainer, "structure_loss")[0] > 0


class TestRows:
    def collator(self, backbone, **kwargs):
        return SugarCollator(SugarProcessor.from_pretrained(backbone), **kwargs)

    def test_captions_appear_in_both_orders(self, backbone):
        torch.manual_seed(0)
        collator = self.collator(backbone, embed_slices=lambda slices: torch.ones(len(slices), 2), flip_captions=True)
        batch = collator([dict(row) for row in rows([caption], 40)])
        first = batch["slice_modality"][:, 0]
        assert 10 < (first == TEXT).sum() < 30
        learnt = (batch["labels"] != -100).any(1)
        assert torch.equal(learnt, first == IMAGE)
        batch = collator([dict(row) for row in rows([conversation], 8)])
        assert (batch["slice_modality"][:, 0] == IMAGE).all()

    def test_prompt_and_completion_rows_learn_the_completion(self, backbone):
        turns = conversation(0) + [
            {"role": "user", "content": [text_part("and where?")]},
            {"role": "assistant", "content": [text_part("left")]},
        ]
        row = {"prompt": turns[:3], "completion": turns[3:], "image": tiny.image()}
        collator = self.collator(backbone)
        [labels] = collator([row])["labels"]
        assert collator.processor.tokenizer.decode(labels[labels != -100]).strip() == "left</s>"
        # as TRL's own collator has it, token for token
        whole = collator([{"messages": turns, "images": [tiny.image()]}])
        assert torch.equal(whole["input_ids"], collator([row])["input_ids"])

    def test_text_only_rows_mix_with_images(self, backbone):
        text = {
            "messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}],
            "images": [],
        }
        batch = self.collator(backbone)([text, dict(rows([conversation], 1)[0])])
        assert len(batch["pixel_values"]) == 1
        assert "pixel_values" not in self.collator(backbone)([text])


class TestErrors:
    """Each names the row and the remedy, and comes before any training."""

    def test_bad_rows(self, backbone, teachers, tmp_path):
        data = rows([conversation], 6).to_list()
        data[3]["messages"].pop()
        data[4]["images"] = []
        with pytest.raises(ValueError, match=r"(?s)row 3 \(row-3\).*no answer.*row 4 \(row-4\).*0 images"):
            SugarTrainer(
                backbone, config(tmp_path, teachers), train_dataset=Dataset.from_list(data, features=FEATURES)
            )

    def test_unreadable_image_is_named_without_teachers_too(self, backbone, tmp_path):
        data = rows([conversation], 6).to_list()
        data[3]["images"] = [{"bytes": b"not an image", "path": None}]
        trainer = SugarTrainer(
            backbone,
            config(tmp_path, structure_weight=0.0),
            train_dataset=Dataset.from_list(data, features=FEATURES),
        )
        with pytest.raises(ValueError, match="(?s)Row row-3.*cannot be decoded"):
            trainer.train()

    def test_too_long(self, backbone, teachers, tmp_path):
        data = rows([conversation], 4).to_list()
        data[2]["messages"][1]["content"][0]["text"] = "long " * 600
        for kwargs in (PAPER, {}):  # found at the first batch, or when the labels are measured
            with pytest.raises(ValueError, match=r"Row row-2 has \d+ tokens after its 1 image\(s\).*limit is 512"):
                SugarTrainer(
                    backbone,
                    config(tmp_path, teachers, **kwargs),
                    train_dataset=Dataset.from_list(data, features=FEATURES),
                ).train()

    def test_cache_of_other_teachers(self, backbone, teachers, tmp_path):
        settings = {"teacher_cache_dir": str(tmp_path / "cache")}
        SugarTrainer(backbone, config(tmp_path, teachers, **settings), train_dataset=rows([conversation]))
        with pytest.raises(ValueError, match="(?s)other settings.*there: .*image=.*asked for: +cross="):
            SugarTrainer(
                backbone,
                config(tmp_path, {"cross": teachers["cross"]}, **settings),
                train_dataset=rows([conversation]),
            )

    def test_rows_that_carry_their_embeddings_need_no_teacher(self, backbone, teachers, tmp_path, monkeypatch):
        data = rows([conversation, caption])
        prepared = add_teacher_embeddings(data, TripleEncoder.from_teachers(teachers), tmp_path / "prepared")
        cross = {"cross": teachers["cross"]}
        with pytest.raises(ValueError, match="(?s)of other teachers.*there: +image=.*asked for: +cross="):
            SugarTrainer(backbone, config(tmp_path, cross), train_dataset=prepared)
        others = add_teacher_embeddings(data, TripleEncoder.from_teachers(cross), tmp_path / "others")
        with pytest.raises(ValueError, match="(?s)of other teachers.*there: +cross=.*asked for: +image="):
            SugarTrainer(backbone, config(tmp_path), train_dataset=prepared, eval_dataset=others)
        losses = {}
        for name, dataset, setting in (
            ("computed", data, teachers),
            ("carried", prepared, None),
            ("streamed", prepared.to_iterable_dataset(), None),
        ):
            if setting is None:
                monkeypatch.setattr("hf_sugar.teachers.checkpoint.AutoConfig", None)
            settings = {"max_steps": 2, "train_sampling_strategy": "sequential", "eval_strategy": "no"}
            trainer = SugarTrainer(backbone, config(tmp_path / name, setting, **settings), train_dataset=dataset)
            trainer.train()
            losses[name] = history(trainer, "structure_loss")
            assert set(trainer.teachers) == set(teachers) and math.isfinite(trainer.evaluate(dataset)["eval_loss"])
        assert losses["carried"] == losses["computed"]
        assert losses["streamed"] == pytest.approx(losses["computed"], rel=1e-5)

    @pytest.mark.parametrize(
        "name, value",
        [
            *(("structure_weight", value) for value in (-1.0, math.nan, math.inf, 1e200)),
            *(("delta", value) for value in (0.0, 1e200, math.nan)),
            *(
                (name, 0)
                for name in ("positions_per_sample", "retrieval_dim", "per_device_train_batch_size", "max_length")
            ),
            ("label_kernel", "dtw"),
            ("teacher_mode", "offline"),
            # what TRL would take and nothing here would heed
            *((name, True) for name in ("packing", "completion_only_loss", "assistant_only_loss")),
            ("completion_only_loss", False),
            ("label_smoothing_factor", 0.1),
        ],
    )
    def test_settings_that_cannot_be_meant(self, tmp_path, name, value):
        with pytest.raises(ValueError, match=f"`{name}`"):
            config(tmp_path, **{name: value})

    def test_dataset_with_transform(self, backbone, teachers, tmp_path):
        with pytest.raises(ValueError, match="with_transform.*`map`"):
            SugarTrainer(
                backbone,
                config(tmp_path, teachers),
                train_dataset=rows([conversation]).with_transform(lambda rows: rows),
            )


class TestDefaults:
    def test_machine_without_gpu(self, tmp_path, caplog, monkeypatch):
        """TRL's defaults are those of a GPU with bfloat16; what is asked for stays."""
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
        with caplog.at_level("INFO"), warnings.catch_warnings():
            warnings.simplefilter("error")
            args = SugarTrainingConfig(str(tmp_path))
        assert (args.use_cpu, args.bf16) == (True, False)
        assert args.gradient_checkpointing
        assert SugarTrainingConfig(str(tmp_path), bf16=True).bf16
        # the machine that asks what a run needs need not be the one that trains
        assert EstimatedTrainingConfig(str(tmp_path)).bf16
        assert not EstimatedTrainingConfig(str(tmp_path), bf16=False).bf16
