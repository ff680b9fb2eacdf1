"""Whole runs: saved and resumed, in two processes, evaluated in between."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.utils import gather_object
from peft import LoraConfig
from test_trainer import PAPER, backbone, caption, config, conversation, history, rows, story, teachers
from transformers import EarlyStoppingCallback

from hf_sugar import SugarTrainer
from hf_sugar.alignment import label_matrix


__all__ = ["backbone", "teachers"]  # fixtures


class TestSaving:
    @pytest.mark.parametrize("lora", [False, True])
    def test_resume_goes_on_as_if_never_stopped(self, backbone, teachers, tmp_path, lora):
        def trainer(steps, **kwargs):
            return SugarTrainer(
                backbone,
                config(
                    tmp_path / "out",
                    teachers,
                    lr_scheduler_type="constant",
                    warmup_steps=0,
                    max_steps=steps,
                    save_strategy="steps",
                    save_steps=2,
                    **kwargs,
                ),
                train_dataset=rows([conversation, caption, story]),
                peft_config=LoraConfig(r=4) if lora else None,
            )

        whole = trainer(4)
        whole.train()
        resumed = trainer(4)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
        for key in ("generative_loss", "structure_loss"):
            assert history(resumed, key)[-2:] == pytest.approx(history(whole, key)[-2:], rel=1e-5)
        assert history(whole, "loss")[2] != pytest.approx(history(whole, "loss")[0], rel=1e-3)

    def test_full_checkpoint_can_be_trained_on(self, backbone, teachers, tmp_path):
        first = SugarTrainer(
            backbone, config(tmp_path / "a", teachers, max_steps=1), train_dataset=rows([conversation])
        )
        first.train()
        first.save_model()
        second = SugarTrainer(
            str(tmp_path / "a"),
            config(tmp_path / "b", teachers, max_steps=1, retrieval_dim=8),
            train_dataset=rows([conversation]),
        )
        # the projector is the one that was saved, whatever size a new one would have
        for name, value in first.model.retrieval_projector.state_dict().items():
            assert torch.equal(second.model.retrieval_projector.state_dict()[name], value)


def compared(path, backbone, teachers, batch):
    """Losses of the same rows in the same global batches, and the evaluation of an uneven number of rows."""
    settings = dict(positions_per_sample=99, flip_captions=False, train_sampling_strategy="sequential", max_steps=3)
    trainer = SugarTrainer(
        backbone,
        config(path, teachers, per_device_train_batch_size=batch, **settings),
        train_dataset=rows([conversation, story], 16),
        eval_dataset=rows([conversation, story, caption], 7),
    )
    trainer.args.per_device_train_batch_size = 4  # rows that are compared in an evaluation
    stream = SugarTrainer(
        backbone,
        config(path, structure_weight=0.0, per_device_train_batch_size=batch),
        train_dataset=rows([conversation], 16).to_iterable_dataset(num_shards=2),
    )
    read = gather_object([ids for batch in stream.get_train_dataloader() for ids in batch["input_ids"].tolist()])
    keys = ("loss", "generative_loss", "structure_loss", "image_to_text_recall@1")
    evaluated = trainer.evaluate()
    streamed = trainer.evaluate(trainer.eval_dataset.select(range(4)).with_format(None).to_iterable_dataset())
    trainer.train()
    found = {key: history(trainer, key) for key in ("loss", "generative_loss", "structure_loss", "grad_norm")}
    found |= {"rows read": len(read), "different": len({tuple(ids) for ids in read})}
    return found | {
        f"{n}_{key}": metrics[f"eval_{key}"] for n, metrics in enumerate((evaluated, streamed)) for key in keys
    }


def compared_by_matrix(path, backbone, teachers, processes, lora):
    """Losses and weights, with matrices of 8 rows in all; the last window of an epoch has one of its two matrices."""
    trainer = SugarTrainer(
        backbone,
        config(
            path,
            teachers,
            **{"per_device_train_batch_size": 4 // processes, "matrix_batch_size": 8 // processes, "optim": "sgd"},
            **{"gradient_accumulation_steps": 4, "positions_per_sample": 99, "train_sampling_strategy": "sequential"},
        ),
        train_dataset=rows([conversation, caption, story], 24),
        peft_config=LoraConfig(r=4) if lora else None,
    )
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad]).double()
    assert all(torch.equal(weights, other) for other in trainer.accelerator.gather(weights[None]))
    losses = [history(trainer, key) for key in ("loss", "structure_loss", "contrastive_loss", "grad_norm")]
    return [*sum(losses, []), (weights * torch.arange(len(weights)).cos()).sum().item()]


def agree(path, backbone, teachers, lora, on_start):
    """Whether the processes end with the same weights when they have evaluated before they train."""
    data = rows([conversation, caption], 8)
    trainer = SugarTrainer(
        backbone,
        config(path, teachers, eval_strategy="steps", eval_steps=2, eval_on_start=on_start),
        train_dataset=data,
        eval_dataset=data,
        peft_config=LoraConfig(r=4) if lora else None,
    )
    if not on_start:
        trainer.evaluate()
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
    first, second = trainer.accelerator.gather(weights).chunk(2)
    return type(trainer.model_wrapped).__name__, torch.equal(first, second)


WORKER = """
import json, sys
sys.path.insert(0, sys.argv[1])
import test_trainer_runs as t
t.torch.set_num_threads(1)
path, backbone, teachers = sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
found = [t.compared(path, backbone, teachers, 4)]
found += [t.compared_by_matrix(path, backbone, teachers, 2, lora) for lora in (False, True)]
found += [t.agree(path, backbone, teachers, *how) for how in ((False, False), (True, False), (True, True))]
if t.torch.distributed.get_rank() == 0:
    print("RESULT", json.dumps(found))
"""


def test_two_processes(backbone, teachers, tmp_path):
    """As one process with the same global batch: the structure loss compares the positions of both processes with one
    another, a stream is divided between them, and evaluation counts every row once. Their weights stay equal, evaluated before or not: accelerate takes a
    model that was prepared for an evaluation as it is, without DDP."""
    (tmp_path / "worker.py").write_text(WORKER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = [str(Path(__file__).parent), str(tmp_path / "two"), backbone, json.dumps(teachers)]
    result = subprocess.run(
        [*launch, str(tmp_path / "worker.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, result.stderr[-3000:]
    two, *by_matrix, first, second, third = json.loads(lines[0].removeprefix("RESULT"))
    for key, values in compared(tmp_path / "one", backbone, teachers, 8).items():
        assert two[key] == pytest.approx(values, abs=1e-5, rel=1e-5), key
    assert two["rows read"] == two["different"] == 16
    for lora, found in enumerate(by_matrix):
        expected = compared_by_matrix(tmp_path / "one", backbone, teachers, 1, bool(lora))
        assert found == pytest.approx(expected, abs=1e-5, rel=1e-5)
    assert [first, second, third] == 3 * [["DistributedDataParallel", True]]
    assert "FutureWarning" not in result.stderr


class TestEvaluation:
    def test_apart_from_the_training(self, backbone, teachers, tmp_path):
        """The same every time, whatever the batches, and the training does not notice."""
        losses = []
        for strategy in ("no", "steps"):
            trainer = SugarTrainer(
                backbone,
                config(tmp_path, teachers, positions_per_sample=1, eval_strategy=strategy, eval_steps=1),
                train_dataset=rows([caption, story]),
                eval_dataset={"a": rows([story], 6), "b": rows([caption], 5)},
            )
            trainer.train()
            losses.append(history(trainer, "loss"))
        assert losses[0] == losses[1]
        first = trainer.evaluate()
        trainer.args.per_device_eval_batch_size = 1
        second = trainer.evaluate()
        names = ("loss", "generative_loss", "structure_loss", "samples_compared")
        for name in [f"eval_{key}_{name}" for key in "ab" for name in names] + ["eval_b_image_to_text_recall@1"]:
            assert second[name] == pytest.approx(first[name], rel=1e-5), name
        predicted = trainer.predict(rows([caption], 5), metric_key_prefix="eval_b").metrics
        assert predicted["eval_b_loss"] == pytest.approx(first["eval_b_loss"], rel=1e-5)

    def test_loss_of_rows(self, backbone, teachers, tmp_path):
        """Against the mean over all tokens, and over groups of rows, computed by hand."""
        data = rows([conversation, story], 6)
        trainer = SugarTrainer(
            backbone,
            config(tmp_path, teachers, **PAPER, per_device_eval_batch_size=2, positions_per_sample=99, max_steps=1),
            train_dataset=data,
            eval_dataset=data,
        )
        found = trainer.evaluate()
        losses, model = [], trainer.model.eval()
        for group in (range(4), range(4, 6)):
            batch = trainer._eval_collator([trainer.eval_dataset[i] for i in group])
            teacher_embeddings, modality = batch.pop("teacher_embeddings"), batch.pop("slice_modality")
            with torch.no_grad():
                output = model(**batch)
            tokens = (batch["labels"][:, 1:] != -100).sum().item()
            present = modality >= 0
            counts = present.sum(1)
            labels, _ = label_matrix(
                teacher_embeddings[present],
                torch.tensor([0, *counts.cumsum(0)]),
                torch.tensor([(i, n + 1) for i, count in enumerate(counts) for n in range(count)]),
                modality=modality[present],
                split=trainer._split,
            )
            cosines = output.embeddings[present] @ output.embeddings[present].T
            structure = ((cosines - labels) ** 2).sum() / len(labels)
            losses.append((output.loss.item() * tokens, tokens, structure.item() * len(group), len(group)))
        generative, tokens, structure, count = map(sum, zip(*losses))
        assert found["eval_generative_loss"] == pytest.approx(generative / tokens, rel=1e-4)
        assert found["eval_structure_loss"] == pytest.approx(structure / count, rel=1e-4)
        assert found["eval_loss"] == pytest.approx(generative / tokens + 0.3 * structure / count, rel=1e-4)

    def test_early_stopping_on_recall(self, backbone, teachers, tmp_path):
        trainer = SugarTrainer(
            backbone,
            config(
                tmp_path,
                teachers,
                learning_rate=0.0,
                eval_strategy="steps",
                eval_steps=1,
                save_strategy="steps",
                save_steps=1,
                load_best_model_at_end=True,
                metric_for_best_model="image_to_text_recall@1",
            ),
            train_dataset=rows([caption]),
            eval_dataset=rows([caption], 6),
            callbacks=[EarlyStoppingCallback(1)],
        )
        trainer.train()
        assert trainer.state.global_step == 2 and trainer.state.best_global_step == 1


class TestBatches:
    def test_one_sample_is_nothing_to_compare(self, backbone, teachers, tmp_path, caplog):
        def trainer(n, **kwargs):
            return SugarTrainer(backbone, config(tmp_path, teachers, **kwargs), train_dataset=rows([story], n))

        with pytest.raises(ValueError, match="one sample.*per_device_train_batch_size.*allow_single_sample"):
            trainer(4, per_device_train_batch_size=1, gradient_accumulation_steps=8)
        allowed = trainer(4, per_device_train_batch_size=1, allow_single_sample=True, max_steps=1)
        assert "the embeddings collapse" in caplog.text
        allowed.train()
        assert history(allowed, "structure_loss")[0] > 0
        assert history(allowed, "samples_compared") == [1]
        # the last batch of an epoch may have one row
        uneven = trainer(5, max_steps=2)
        uneven.train()
        assert history(uneven, "samples_compared") == [4, 1]
        assert history(uneven, "structure_loss")[0] > 0 == history(uneven, "structure_loss")[1]

    def test_persistent_workers_know_the_epoch(self, backbone, teachers, tmp_path):
        first_slices = []

        class Noting(SugarTrainer):
            def training_step(self, model, inputs, *args, **kwargs):
                first_slices[-1].append(inputs["slice_modality"][:, 0].tolist())
                return super().training_step(model, inputs, *args, **kwargs)

        for kwargs in ({}, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}):
            first_slices.append([])
            Noting(
                backbone,
                config(tmp_path, teachers, **PAPER, max_steps=9, learning_rate=0.0, **kwargs),
                train_dataset=rows([caption]),
            ).train()
        assert first_slices[0] == first_slices[1]
        assert len({sum(map(sum, first_slices[0][n : n + 3])) for n in (0, 3, 6)}) > 1


class TestResume:
    def test_goes_back_to_a_whole_checkpoint(self, backbone, teachers, tmp_path, caplog):
        def trainer(directory):
            return SugarTrainer(
                backbone,
                config(directory, teachers, save_strategy="steps", save_steps=2),
                train_dataset=rows([conversation]),
                peft_config=LoraConfig(r=4),
            )

        trainer(tmp_path / "out").train()
        newest = tmp_path / "out" / "checkpoint-4"
        state = newest / "trainer_state.json"
        state.write_text(state.read_text()[:100])  # the last file that is written
        resumed = trainer(tmp_path / "out")
        with pytest.raises(
            ValueError, match="(?s)checkpoint-4 is no checkpoint that was written to its end.*checkpoint-2"
        ):
            resumed.train(resume_from_checkpoint=str(newest))
        resumed.train(resume_from_checkpoint=True)
        assert "checkpoint-4 was not written to its end" in caplog.text
        assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == [1, 2, 3, 4]
        with pytest.raises(ValueError, match="No checkpoint in .* was written to its end"):
            trainer(tmp_path / "empty").train(resume_from_checkpoint=True)
