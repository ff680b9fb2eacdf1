"""Whole runs: saved and resumed, in two processes, evaluated in between."""

import pytest
import torch
from accelerate.utils import gather_object
from tiny_runs import PAPER, caption, config, conversation, history, in_two_processes, rows, story, trainer
from transformers import EarlyStoppingCallback

from hf_sugar import SugarTrainer
from hf_sugar.alignment import label_matrix


class TestSaving:
    @pytest.mark.parametrize("lora", [False, True])
    def test_resume_goes_on_as_if_never_stopped(self, make, tmp_path, lora):
        settings = dict(lr_scheduler_type="constant", warmup_steps=0, save_strategy="steps", save_steps=2)
        whole, resumed = (make((conversation, caption, story), lora=lora, **settings) for _ in range(2))
        whole.train()
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
        for key in ("generative_loss", "structure_loss"):
            assert history(resumed, key)[-2:] == pytest.approx(history(whole, key)[-2:], rel=1e-5)
        assert history(whole, "loss")[2] != pytest.approx(history(whole, "loss")[0], rel=1e-3)

    def test_full_checkpoint_can_be_trained_on(self, make, tmp_path):
        first = make(path="a", max_steps=1)
        first.train()
        first.save_model()
        second = make(model=str(tmp_path / "a"), path="b", retrieval_dim=8)
        # the projector is the one that was saved, whatever size a new one would have
        for name, value in first.model.retrieval_projector.state_dict().items():
            assert torch.equal(second.model.retrieval_projector.state_dict()[name], value)

    def test_goes_back_to_a_whole_checkpoint(self, make, tmp_path, caplog):
        settings = dict(lora=True, save_strategy="steps", save_steps=2)
        make(**settings).train()
        newest = tmp_path / "run" / "checkpoint-4"
        state = newest / "trainer_state.json"
        state.write_text(state.read_text()[:100])  # the last file that is written
        resumed = make(**settings)
        with pytest.raises(ValueError, match="(?s)checkpoint-4 is no whole checkpoint.*checkpoint-2"):
            resumed.train(resume_from_checkpoint=str(newest))
        resumed.train(resume_from_checkpoint=True)
        assert "checkpoint-4 was not written to its end" in caplog.text
        assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == [1, 2, 3, 4]
        with pytest.raises(ValueError, match="No checkpoint in .* is whole"):
            make(path="empty").train(resume_from_checkpoint=True)


def compared(path, backbone, teachers, batch):
    """Losses of the same rows in the same global batches, and the evaluation of an uneven number of rows."""
    settings = dict(positions_per_sample=99, flip_captions=False, train_sampling_strategy="sequential", max_steps=3)
    args = config(path, teachers, per_device_train_batch_size=batch, **settings)
    run = trainer(
        backbone, args, rows([conversation, story], 16), eval_dataset=rows([conversation, story, caption], 7)
    )
    run.args.per_device_train_batch_size = 4  # rows that are compared in an evaluation
    args = config(path, structure_weight=0.0, per_device_train_batch_size=batch)
    stream = trainer(backbone, args, rows([conversation], 16).to_iterable_dataset(num_shards=2))
    read = gather_object([ids for batch in stream.get_train_dataloader() for ids in batch["input_ids"].tolist()])
    keys = ("loss", "generative_loss", "structure_loss", "image_to_text_recall@1")
    evaluated = run.evaluate()
    streamed = run.evaluate(run.eval_dataset.select(range(4)).with_format(None).to_iterable_dataset())
    run.train()
    found = {key: history(run, key) for key in ("loss", "generative_loss", "structure_loss", "grad_norm")}
    found |= {"rows read": len(read), "different": len({tuple(ids) for ids in read})}
    return found | {
        f"{n}_{key}": metrics[f"eval_{key}"] for n, metrics in enumerate((evaluated, streamed)) for key in keys
    }


def compared_by_matrix(path, backbone, teachers, processes):
    """Losses and weights, with matrices of 8 rows in all; the last window of an epoch has one of its two matrices."""
    settings = {"per_device_train_batch_size": 4 // processes, "matrix_batch_size": 8 // processes, "optim": "sgd"}
    settings |= {"gradient_accumulation_steps": 4, "positions_per_sample": 99, "train_sampling_strategy": "sequential"}
    args = config(path, teachers, max_steps=2, **settings)
    run = trainer(backbone, args, rows([conversation, caption, story], 24))
    run.train()
    weights = torch.cat([p.detach().flatten() for p in run.model.parameters() if p.requires_grad]).double()
    assert all(torch.equal(weights, other) for other in run.accelerator.gather(weights[None]))
    losses = [history(run, key) for key in ("loss", "structure_loss", "contrastive_loss", "grad_norm")]
    return [*sum(losses, []), (weights * torch.arange(len(weights)).cos()).sum().item()]


def agree(path, backbone, teachers, lora, on_start):
    """Whether the processes end with the same weights when they have evaluated before they train."""
    data = rows([conversation, caption], 8)
    args = config(path, teachers, eval_strategy="steps", eval_steps=2, eval_on_start=on_start, max_steps=2)
    run = trainer(backbone, args, data, lora, eval_dataset=data)
    if not on_start:
        run.evaluate()
    run.train()
    weights = torch.cat([p.detach().flatten() for p in run.model.parameters() if p.requires_grad])
    first, second = run.accelerator.gather(weights).chunk(2)
    return type(run.model_wrapped).__name__, torch.equal(first, second)


def all_of_them(path, backbone, teachers):
    agreed = [agree(path, backbone, teachers, *how) for how in ((False, False), (True, True))]
    return [compared(path, backbone, teachers, 4), compared_by_matrix(path, backbone, teachers, 2), *agreed]


def test_two_processes(backbone, teachers, tmp_path):
    """As one process with the same global batch: the structure loss compares the positions of both processes with one
    another, a stream is divided between them, and evaluation counts every row once. Their weights stay equal, evaluated before
    or not: accelerate takes a model that was prepared for an evaluation as it is, without DDP."""
    arguments = ("all_of_them", str(tmp_path / "two"), backbone, teachers)
    two, by_matrix, *agreed = in_two_processes(tmp_path, "test_trainer_runs", *arguments)
    for key, values in compared(tmp_path / "one", backbone, teachers, 8).items():
        assert two[key] == pytest.approx(values, abs=1e-5, rel=1e-5), key
    assert two["rows read"] == two["different"] == 16
    expected = compared_by_matrix(tmp_path / "one", backbone, teachers, 1)
    assert by_matrix == pytest.approx(expected, abs=1e-5, rel=1e-5)
    assert agreed == 2 * [["DistributedDataParallel", True]]


class TestEvaluation:
    def test_apart_from_the_training(self, make):
        """The same every time, whatever the batches, and the training does not notice."""
        losses = []
        for strategy in ("no", "steps"):
            evaluated = {"a": rows([story], 6), "b": rows([caption], 5)}
            settings = {"positions_per_sample": 1, "eval_strategy": strategy, "eval_steps": 1, "max_steps": 2}
            trainer = make((caption, story), eval_dataset=evaluated, **settings)
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

    def test_loss_of_rows(self, make):
        """Against the mean over all tokens, and over groups of rows, computed by hand."""
        data = rows([conversation, story], 6)
        trainer = make(data, eval_dataset=data, **PAPER, per_device_eval_batch_size=2, positions_per_sample=99)
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

    def test_early_stopping_on_recall(self, make):
        settings = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, learning_rate=0.0)
        settings |= dict(load_best_model_at_end=True, metric_for_best_model="image_to_text_recall@1")
        callbacks = [EarlyStoppingCallback(1)]
        trainer = make((caption,), eval_dataset=rows([caption], 6), callbacks=callbacks, **settings)
        trainer.train()
        assert trainer.state.global_step == 2 and trainer.state.best_global_step == 1


class TestBatches:
    def test_one_sample_is_nothing_to_compare(self, make, caplog):
        with pytest.raises(ValueError, match="one sample.*per_device_train_batch_size.*allow_single_sample"):
            make(rows([story], 4), per_device_train_batch_size=1, gradient_accumulation_steps=8)
        allowed = make(rows([story], 4), per_device_train_batch_size=1, allow_single_sample=True, max_steps=1)
        assert "one sample alone" in caplog.text
        allowed.train()
        assert history(allowed, "structure_loss")[0] > 0
        assert history(allowed, "samples_compared") == [1]
        # the last batch of an epoch may have one row
        uneven = make(rows([story], 5), max_steps=2)
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
            args = config(tmp_path, teachers, **PAPER, max_steps=9, learning_rate=0.0, **kwargs)
            Noting(backbone, args, train_dataset=rows([caption])).train()
        assert first_slices[0] == first_slices[1]
        assert len({sum(map(sum, first_slices[0][n : n + 3])) for n in (0, 3, 6)}) > 1
