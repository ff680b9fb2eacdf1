"""The trainer: its losses, its rows, and what it refuses before any training."""

import math
import warnings

import pytest
import tiny
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig
from tiny_runs import COMMON, FEATURES, PAPER, caption, config, conversation, history, rows, story, text_part
from trl import SFTConfig, SFTTrainer

from hf_sugar import SugarProcessor, SugarTrainer, SugarTrainingConfig
from hf_sugar.alignment import IMAGE, TEXT, label_matrix
from hf_sugar.cli.train import TrainArguments
from hf_sugar.data import row_slices
from hf_sugar.models.rows_sugar import fill_images
from hf_sugar.teachers import TripleEncoder, add_teacher_embeddings
from hf_sugar.training import SugarCollator


@pytest.mark.parametrize(("lora", "accumulation"), [(False, 1), (False, 2), (True, 2)])
def test_weight_zero_is_sft_to_the_last_bit(backbone, tmp_path, lora, accumulation):
    """TRL's own trainer on the plain LLaVA class, with the same rows, seed, chat template and masking."""
    kwargs = {**COMMON, "gradient_accumulation_steps": accumulation, "lr_scheduler_type": "cosine"}
    peft_config = LoraConfig(target_modules=r".*language_model.*q_proj", r=4) if lora else None
    data = {"train_dataset": rows([conversation]), "peft_config": peft_config}
    args = SugarTrainingConfig(str(tmp_path / "a"), structure_weight=0.0, warmup_steps=0.03, **kwargs)
    ours = SugarTrainer(backbone, args, **data)
    ours.train()
    args = SFTConfig(str(tmp_path / "b"), max_length=None, assistant_only_loss=True, warmup_steps=0.03, **kwargs)
    theirs = SFTTrainer(backbone, args, processing_class=SugarProcessor.from_pretrained(backbone), **data)
    theirs.train()
    assert history(ours, "loss") == history(theirs, "loss")
    assert history(ours, "grad_norm") == history(theirs, "grad_norm")
    assert len(history(ours, "loss")) == 4


class TestStructureLoss:
    def test_trains_and_logs_both_losses(self, make):
        evaluation = dict(eval_dataset=rows([caption], 6), eval_strategy="steps", eval_steps=3)
        trainer = make((conversation, caption, story), lora=True, max_steps=3, **evaluation)
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

    def test_loss_is_the_label_matrix_against_the_cosines(self, make):
        """The logged value, computed again from the model's and the teachers' embeddings of every prefix."""
        data = rows([conversation, story], 4)
        trainer = make(data, **PAPER, positions_per_sample=99, max_steps=1, learning_rate=0.0)
        trainer.train()
        [logged] = history(trainer, "structure_loss")
        # their memory is the training's
        assert all("model" not in vars(teacher) for teacher in trainer._encoder._teachers)

        model, processor = trainer.model.eval(), trainer.processing_class
        messages = [fill_images(row["messages"], row["images"]) for row in data]
        with torch.no_grad():
            vectors = [model(**processor.encode_conversations([each])).embeddings[0] for each in messages]
        documents = [row_slices(row) for row in data]
        items, lengths = sum(documents, []), list(map(len, documents))
        labels, _ = label_matrix(
            trainer._encoder.encode(items),
            F.pad(torch.tensor(lengths).cumsum(0), (1, 0)),
            torch.tensor([(d, n + 1) for d, length in enumerate(lengths) for n in range(length)]),
            modality=torch.tensor([TEXT if isinstance(item, str) else IMAGE for item in items]),
            split=trainer._split,
        )
        vectors = torch.cat(vectors).double()
        expected = ((vectors @ vectors.T - labels.double()) ** 2).sum() / len(vectors)
        assert logged == pytest.approx(expected.item(), rel=1e-4)

    @pytest.mark.parametrize(
        "settings",
        [
            {"gradient_checkpointing": True, "bf16": True, "gradient_accumulation_steps": 2},
            {"label_kernel": "mean", "image_pooling": "last", "label_normalization": "none"}
            | {"structure_reduction": "mean", "teachers": "cross"},
        ],
        ids=["memory", "labels"],
    )
    def test_settings(self, make, teachers, settings):
        if "teachers" in settings:
            settings = settings | {"teachers": {"cross": teachers["cross"]}}
        trainer = make((conversation, caption, story), lora=True, max_steps=2, **settings)
        trainer.train()
        losses = history(trainer, "structure_loss")
        assert len(losses) == 2 and all(value > 0 for value in losses)

    def test_checkpointing_and_accumulation_change_nothing(self, make):
        def losses(**kwargs):
            trainer = make((conversation, story), flip_captions=False, positions_per_sample=99, **kwargs)
            trainer.train()
            return history(trainer, "generative_loss"), history(trainer, "structure_loss")

        plain, checkpointed = losses(max_steps=3), losses(max_steps=3, gradient_checkpointing=True)
        for a, b in zip(plain, checkpointed):
            assert a == pytest.approx(b, rel=1e-4)
        # with no learning, the generative loss of a batch is that of its halves accumulated
        settings = {"learning_rate": 0.0, "max_steps": 2}
        halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        assert losses(**settings)[0] == pytest.approx(losses(**settings, **halves)[0], rel=1e-4)

    def test_streaming_with_online_teachers(self, make):
        stream = rows([conversation, caption]).to_iterable_dataset()
        trainer = make(stream, teacher_mode="online", max_steps=2)
        trainer.train()
        assert len(history(trainer, "structure_loss")) == 2
        with pytest.raises(ValueError, match="streaming.*teacher_mode='online'"):
            make(stream)

    def test_rows_of_similar_length_share_a_batch_when_asked(self, make):
        data = rows([conversation, story], 160)
        evaluated = data.select(range(6))
        trainer = make(data, eval_dataset=evaluated, train_sampling_strategy="group_by_length")
        batches = [batch["slice_modality"] for batch in trainer.get_train_dataloader()]
        # conversations have three slices, stories four or more
        mixed = sum((batch[:, 3:] >= 0).any(1).unique().numel() > 1 for batch in batches)
        assert len(batches) == 40 and mixed <= 10
        assert len(list(trainer.get_eval_dataloader())) >= 1


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

    def test_bad_rows(self, make):
        data = rows([conversation], 6).to_list()
        data[3]["messages"].pop()
        data[4]["images"] = []
        with pytest.raises(ValueError, match=r"(?s)row 3 \(row-3\).*no answer.*row 4 \(row-4\).*0 images"):
            make(Dataset.from_list(data, features=FEATURES))

    def test_unreadable_image_is_named_without_teachers_too(self, make):
        data = rows([conversation], 6).to_list()
        data[3]["images"] = [{"bytes": b"not an image", "path": None}]
        trainer = make(Dataset.from_list(data, features=FEATURES), structure_weight=0.0)
        with pytest.raises(ValueError, match="(?s)Row row-3.*cannot be decoded"):
            trainer.train()

    def test_too_long(self, make):
        data = rows([conversation], 4).to_list()
        data[2]["messages"][1]["content"][0]["text"] = "long " * 600
        for kwargs in (PAPER, {}):  # found at the first batch, or when the labels are measured
            with pytest.raises(ValueError, match=r"Row row-2 has \d+ tokens after its 1 image\(s\).*limit is 512"):
                make(Dataset.from_list(data, features=FEATURES), **kwargs).train()

    def test_cache_of_other_teachers(self, make, teachers, tmp_path):
        make(teacher_cache_dir=str(tmp_path / "cache"))
        with pytest.raises(ValueError, match="(?s)other settings.*there: .*image=.*asked for: +cross="):
            make(teachers={"cross": teachers["cross"]}, teacher_cache_dir=str(tmp_path / "cache"))

    def test_rows_that_carry_their_embeddings_need_no_teacher(self, make, teachers, tmp_path, monkeypatch):
        data, cross = rows([conversation, caption]), {"cross": teachers["cross"]}
        prepared = add_teacher_embeddings(data, TripleEncoder.from_teachers(teachers), tmp_path / "prepared")
        with pytest.raises(ValueError, match="(?s)of other teachers.*there: +image=.*asked for: +cross="):
            make(prepared, teachers=cross)
        others = add_teacher_embeddings(data, TripleEncoder.from_teachers(cross), tmp_path / "others")
        with pytest.raises(ValueError, match="(?s)of other teachers.*there: +cross=.*asked for: +image="):
            make(prepared, teachers=None, eval_dataset=others)
        losses = {}
        for name, dataset in (("computed", data), ("carried", prepared), ("streamed", prepared.to_iterable_dataset())):
            settings = {"max_steps": 2, "train_sampling_strategy": "sequential", "eval_strategy": "no"}
            if name != "computed":
                settings["teachers"] = None
                monkeypatch.setattr("hf_sugar.teachers.checkpoint.AutoConfig", None)
            trainer = make(dataset, path=name, **settings)
            trainer.train()
            losses[name] = history(trainer, "structure_loss")
            assert set(trainer.teachers) == set(teachers) and math.isfinite(trainer.evaluate(dataset)["eval_loss"])
        assert losses["carried"] == losses["computed"]
        assert losses["streamed"] == pytest.approx(losses["computed"], rel=1e-5)

    @pytest.mark.parametrize(
        "name, value",
        [
            ("learning_rate", "1e-4"),
            *(("structure_weight", value) for value in (-1.0, math.nan, math.inf, 1e200)),
            *(("delta", value) for value in (0.0, 1e200, math.nan)),
            *((name, math.nan) for name in ("learning_rate", "weight_decay", "max_grad_norm", "adam_epsilon")),
            *((name, 0) for name in ("positions_per_sample", "retrieval_dim", "max_length")),
            *(("per_device_train_batch_size", 0), ("label_kernel", "dtw"), ("teacher_mode", "offline")),
            # what TRL would take and nothing here would heed
            *((name, True) for name in ("packing", "completion_only_loss", "assistant_only_loss")),
            *(("completion_only_loss", False), ("label_smoothing_factor", 0.1)),
        ],
    )
    def test_settings_that_cannot_be_meant(self, tmp_path, name, value):
        with pytest.raises(ValueError, match=f"`{name}`"):
            config(tmp_path, **{name: value})

    def test_settings_of_a_projector_that_is_there(self, make, caplog):
        model = make().model
        make(model=model)
        assert "has no effect" not in caplog.text
        make(model=model, retrieval_dim=8)
        assert "`retrieval_dim` has no effect: the model was made with 16" in caplog.text

    def test_no_step(self, make):
        trainer = make(per_device_train_batch_size=64, dataloader_drop_last=True)
        with pytest.raises(ValueError, match="No step was made"):
            trainer.train()

    def test_dataset_with_transform(self, make):
        with pytest.raises(ValueError, match="with_transform.*`map`"):
            make(rows([conversation]).with_transform(lambda rows: rows))


def test_defaults_of_a_machine_without_gpu(tmp_path, caplog, monkeypatch):
    """TRL's defaults are those of a GPU with bfloat16; what is asked for stays."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with caplog.at_level("INFO"), warnings.catch_warnings():
        warnings.simplefilter("error")
        args = SugarTrainingConfig(str(tmp_path))
    assert (args.use_cpu, args.bf16) == (True, False)
    assert args.gradient_checkpointing
    assert SugarTrainingConfig(str(tmp_path), bf16=True).bf16
    # the machine that asks what a run needs need not be the one that trains
    assert TrainArguments(str(tmp_path), estimate_memory=True).bf16
    assert not TrainArguments(str(tmp_path), estimate_memory=True, bf16=False).bf16
