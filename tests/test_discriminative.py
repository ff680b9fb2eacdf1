"""The discriminative loss: what is compared with what, labels of one scale, and large matrices in small memory."""

import copy
import json
import math
from dataclasses import replace
from functools import partial

import pytest
import tiny
import tiny_runs
import torch
import torch.nn.functional as F
import transformers
from datasets import Image, List
from peft import LoraConfig
from tiny import randn
from tiny_runs import PAPER, caption, config, conversation, history, rows, story

from hf_sugar import SugarForConditionalGeneration
from hf_sugar.alignment import IMAGE, TEXT, label_matrix
from hf_sugar.alignment.calibration import BLOCKS, block_statistics, calibrate, label_blocks
from hf_sugar.training.cached import compare_ahead
from hf_sugar.training.discriminative import (
    NEGATIVE,
    POSITIVE,
    ROW_COLUMNS,
    DiscriminativeLoss,
    discriminative_rows,
    pad_rows,
)
from hf_sugar.training.heads import embed_rows
from hf_sugar.training.labels import label_statistics, measure_labels


class TestCalibration:
    lengths = torch.tensor([1, 1, 1, 1, 1, 1, 2, 3, 2, 3])
    modality = torch.tensor([IMAGE, IMAGE, IMAGE, TEXT, TEXT, TEXT, IMAGE, TEXT, TEXT, IMAGE])

    def kind(self, i, j):
        singles = [k for k in (i, j) if self.lengths[k] == 1]
        if len(singles) < 2:
            return ("sequence-sequence", "single-sequence")[len(singles)]
        return "-".join(sorted("image" if self.modality[k] == IMAGE else "text" for k in singles))

    def test_every_block_has_one_mean_and_spread(self):
        labels = 0.02 * randn(10, 10)
        labels = labels + labels.T
        blocks, different = label_blocks(self.lengths, self.modality), ~torch.eye(10, dtype=torch.bool)
        statistics = block_statistics(labels, blocks, different)
        result = calibrate(labels, blocks, statistics)
        pairs = [(i, j) for i in range(10) for j in range(10) if i != j]
        for number, name in enumerate(BLOCKS):
            values = torch.stack([labels[i, j] for i, j in pairs if self.kind(i, j) == name])
            assert torch.allclose(statistics[number], torch.stack([values.mean(), values.std()]))
            values = torch.stack([result[i, j] for i, j in pairs if self.kind(i, j) == name])
            assert values.mean().abs() < 0.03 and 0.12 < values.std() < 0.21  # within -1 and 1
        # what a teacher of another scale says comes out the same
        scale, shift = torch.rand(5) + 0.5, torch.rand(5)
        other = labels * scale[blocks] + shift[blocks]
        again = calibrate(other, blocks, block_statistics(other, blocks, different))
        assert torch.allclose(again, result, atol=1e-6)

    def test_too_little_to_measure(self):
        labels, blocks = torch.full((2, 2), 0.5), torch.zeros(2, 2, dtype=torch.long)
        statistics = block_statistics(labels, blocks, ~torch.eye(2, dtype=torch.bool))
        assert torch.equal(calibrate(labels, blocks, statistics), labels)

    def test_statistics_are_those_of_the_data(self, make):
        """The same whatever the batch size, the process or the number of the run."""
        kinds = (conversation, caption, story)
        trainers = [make(kinds, path=str(size), per_device_train_batch_size=size) for size in (2, 4)]
        found = [trainer.discriminative_loss.statistics for trainer in trainers]
        assert torch.equal(*found) and (found[0][:, 1] > 0).all()
        assert make(kinds, path="paper", **PAPER).discriminative_loss.statistics is None

    def test_statistics_are_stored_with_the_embeddings(self, make, tmp_path):
        """And found again for the same rows, teachers and settings alone."""
        cache = {"teacher_cache_dir": str(tmp_path / "cache")}
        trainer = make((caption, story), **cache)
        stored = partial(
            label_statistics,
            trainer.train_dataset,
            trainer.data_collator,
            trainer.args,
            trainer._split,
            tmp_path / "cache",
        )
        measured = trainer.discriminative_loss.statistics
        assert torch.allclose(stored(store_rows=12), measured)
        file = tmp_path / "cache" / "label_statistics.json"
        [[key, values]] = json.loads(file.read_text()).items()
        assert values.keys() == set(BLOCKS)
        file.write_text(json.dumps({key: {**values, BLOCKS[2]: [0.5, 0.25]}}))
        found = make((caption, story), path="again", **cache).discriminative_loss.statistics
        assert found[2].tolist() == [0.5, 0.25] and torch.equal(found[3:], measured[3:])
        for number, other in enumerate(({"delta": 2.0}, {"data": (caption, conversation)})):
            found = make(
                **{"data": (caption, story), **other}, path=str(number), **cache
            ).discriminative_loss.statistics
            assert found[2].tolist() != [0.5, 0.25]
        file.write_text("{")
        with pytest.raises(ValueError, match="label_statistics.json is damaged .*Delete it"):
            stored()

    def test_rows_of_a_stream_are_spread_over_it(self, make, tmp_path, monkeypatch):
        """Not its first ones, and a trainer on the stream takes them."""
        trainer = make((caption, story))
        data, rest = trainer.train_dataset, (trainer.data_collator, trainer.args, trainer._split)
        monkeypatch.setattr("hf_sugar.training.labels.MEASURED_ROWS", 3)
        stored = label_statistics(data.to_iterable_dataset(), *rest, tmp_path, store_rows=len(data))
        collator = replace(trainer.data_collator, processor=None)
        assert torch.equal(stored, measure_labels([data[n] for n in (0, 4, 8)], collator, *rest[1:]))
        assert torch.allclose(label_statistics(data.to_iterable_dataset(), *rest, tmp_path), stored)
        first = label_statistics(data.to_iterable_dataset(), *rest)
        assert torch.equal(first, measure_labels([data[n] for n in (0, 1, 2)], collator, *rest[1:]))
        assert not torch.allclose(first, stored)


@pytest.mark.skipif(transformers.__version__ < "5.23", reason="its random DINOv2 has other weights")
def test_the_papers_loss_is_what_it_was(make):
    """Values of the version before the contrastive loss, of the same seed."""
    trainer = make((conversation, caption, story), **PAPER)
    trainer.train()
    expected = {
        "generative_loss": [6.003761291503906, 6.0142822265625, 5.7428998947143555, 5.505940914154053],
        "structure_loss": [1.387845516204834, 1.282015323638916, 2.1375696659088135, 0.8501686453819275],
        "loss": [6.420114994049072, 6.398886680603027, 6.384171009063721, 5.76099157333374],
    }
    for name, values in expected.items():
        assert history(trainer, name) == pytest.approx(values, rel=1e-6), name


@pytest.fixture(scope="module")
def trainer(backbone, teachers, tmp_path_factory):
    args = config(tmp_path_factory.mktemp("trainer"), teachers, singles_per_sample=2)
    return tiny_runs.trainer(backbone, args, (caption, story, conversation))


class TestSingles:
    def test_they_are_embedded_as_what_they_are(self, trainer):
        """As `embed` does, and without a second look of the vision tower at an image."""
        data, model, processor = trainer.train_dataset, trainer.model.eval(), trainer.processing_class
        batch = trainer.data_collator([data[i] for i in range(4)])
        seen = []
        hook = model.base_model.vision_tower.register_forward_hook(lambda m, inputs, _: seen.append(len(inputs[0])))
        model_inputs = {name: value for name, value in batch.items() if name not in ROW_COLUMNS}
        with torch.no_grad():
            output = model(**model_inputs, fused_lm_head=True)
        hook.remove()
        assert seen == [sum(len(data[i]["images"]) for i in range(4))]
        expected, numbers = [], []
        for i in range(4):
            images = iter([tiny.image(10 * i + k) for k in range(len(data[i]["images"]))])
            parts = [part for message in data[i]["messages"] for part in message["content"]]
            slices = [next(images) if part["type"] == "image" else part["text"] for part in parts]
            chosen = [n for n in batch["single_slices"][i].tolist() if n > 0]
            assert len(chosen) == (1, 2, 0)[i % 3]  # the caption, two slices of a story, none of a conversation
            numbers += chosen
            expected += [model.embed(**processor.embed_inputs([slices[n]]))[0] for n in chosen]
        assert {isinstance(n, int) for n in numbers} == {True}
        assert torch.allclose(output.single_embeddings, torch.stack(expected), atol=1e-5)

    def test_they_change_with_the_epoch_alone(self, trainer):
        collator, data = trainer.data_collator, trainer.train_dataset
        first = collator([data[i] for i in range(12)])["single_slices"]
        assert torch.equal(first, collator([data[i] for i in range(12)])["single_slices"])
        collator.epoch.fill_(1)
        assert not torch.equal(first, collator([data[i] for i in range(12)])["single_slices"])
        collator.epoch.fill_(0)


def note_pairs(trainer, examples):
    """What the contrastive loss is asked about, with numbers in the place of embeddings. Random teachers call all texts nearly
    the same: here each row is something else to them, unless it is the same row."""
    batch = trainer.data_collator(examples)
    known = {example["id"]: randn(*batch["teacher_embeddings"][0].shape, seed=i) for i, example in enumerate(examples)}
    vectors = torch.stack([known[example["id"]] for example in examples]).tensor_split([trainer._split], dim=-1)
    batch["teacher_embeddings"] = torch.cat([F.normalize(half, dim=-1) for half in vectors], dim=-1)
    loss = trainer.discriminative_loss
    given = []
    hook = loss.contrastive.register_forward_hook(lambda module, args, output: given.append(args))
    samples, slices = batch["slice_modality"].shape
    # (row, slices before its end) of a prefix and (row, -1 - slice) of what stands beside it
    prefixes = torch.stack(torch.meshgrid(torch.arange(samples), torch.arange(slices) + 1, indexing="ij"), -1).float()
    beside = batch["single_slices"]
    singles = torch.stack([torch.arange(samples)[:, None].expand_as(beside), -100.0 - beside], -1).float()
    loss(prefixes, batch["teacher_embeddings"], batch["slice_modality"], singles, beside, training=True)
    hook.remove()
    [(queries, candidates, positives, ignored)] = given
    name = [[(int(row), int(which)) for row, which in table] for table in (queries, candidates)]
    first = {candidate for candidate in name[1] if candidate[1] == 1}  # ignored by their own row alone
    pairs = [{(name[0][i], name[1][j]) for i, j in pairs.nonzero().tolist()} for pairs in (positives, ignored)]
    assert first and {(query, (query[0], 1)) for query in name[0] if (query[0], 1) in first} <= pairs[1]
    return pairs[0], {(query, candidate) for query, candidate in pairs[1] if candidate[1] < 0}, set(name[0])


class TestPairs:
    def test_a_prefix_belongs_to_its_next_slice(self, trainer):
        data = trainer.train_dataset
        beside = trainer.data_collator([data[i] for i in range(4)])["single_slices"]
        positives, ignored, queries = note_pairs(trainer, [data[i] for i in range(4)])
        expected = {((i, n), (i, -100 - n)) for i in range(4) for n in beside[i].tolist() if n > 0}
        assert positives == expected and len(expected) == 4
        assert not ignored and queries == {query for query, _ in expected}

    def test_a_question_belongs_to_the_next_picture(self, make):
        """And so does its answer, but no text before the picture that is asked about, and nothing to an answer."""
        data = rows([conversation], 4).map(lambda row: {"messages": row["messages"] * 3, "images": row["images"] * 3})
        trainer = make(data, singles_per_sample=2, positions_per_sample=9)
        positives, ignored, _ = note_pairs(trainer, [trainer.train_dataset[i] for i in range(2)])
        pairs = [(2, 3), (3, 3), (5, 6), (6, 6)]  # slices of a prefix, number of an image
        assert positives == {((i, n), (i, -100 - image)) for i in range(2) for n, image in pairs} and not ignored

    def test_what_the_teachers_call_alike_is_no_negative(self, trainer):
        data = trainer.train_dataset
        positives, ignored, _ = note_pairs(trainer, [data[0], data[0], data[3]])
        assert positives == {((i, 1), (i, -101)) for i in range(3)}
        assert ignored == {((0, 1), (1, -101)), ((1, 1), (0, -101))}  # the same row twice

    def test_positives_and_negatives_of_the_user(self, make):
        columns = {"positives": [["a star", "a red star"], [], ["a square"]], "negatives": [["a moon"], ["a sun"], []]}
        data = rows([conversation], 3)
        for name, column in columns.items():
            data = data.add_column(name, column)
        trainer = make(data, singles_per_sample=0)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
        assert batch["single_slices"].tolist() == [
            [POSITIVE, POSITIVE, NEGATIVE],
            [NEGATIVE, -3, -3],
            [POSITIVE, -3, -3],
        ]
        positives, ignored, queries = note_pairs(trainer, [trainer.train_dataset[i] for i in range(3)])
        assert positives == {((0, 3), (0, -99)), ((2, 3), (2, -99))} and not ignored
        trainer.train()
        assert min(history(trainer, "contrastive_loss")) > 0


class TestNothingIsWithoutEffect:
    @pytest.mark.parametrize(
        "settings, columns, error",
        [
            ({"flip_captions": True}, {}, "`flip_captions` leaves no pairs"),
            ({"singles_per_sample": 0}, {"negatives": [["a"]] * 6}, "The contrastive loss has no pairs"),
            (
                {"discriminative_loss": "structure"},
                {"positives": [["a"]] * 6},
                "`positives` are for the contrastive loss",
            ),
            ({"contrastive_mask_above": math.nan}, {}, "`contrastive_mask_above` is nan"),
            (
                {"discriminative_loss": "structure", "contrastive_weight": 1.0},
                {},
                "`contrastive_weight` would have no effect",
            ),
            ({"activation_offloading": True, "use_cpu": True}, {}, "`activation_offloading` moves activations"),
            ({"matrix_batch_size": 8, "auto_find_batch_size": True}, {}, "`auto_find_batch_size` would change"),
            ({}, {"negatives": ["a"] * 6}, r"train_dataset: `negatives` is Value\('string'\). Make it a list"),
            ({}, {"negatives": [["a"], [" "], [], [], [], []]}, r"Row row-1, negatives\[0\] is empty"),
        ],
    )
    def test_refused(self, make, settings, columns, error):
        data = rows([caption], 6)
        for name, column in columns.items():
            data = data.add_column(name, column)
        with pytest.raises(ValueError, match=error):
            make(data, **settings)

    def test_unreadable_negative_is_skipped(self, make):
        negatives = [[{"bytes": b"none", "path": None}], *[[]] * 5]
        data = rows([caption], 6).add_column("negatives", negatives, feature=List(Image()))
        assert len(make(data, on_bad_row="skip").train_dataset) == 5

    def test_rows_without_structure_are_fine_tuning(self, make):
        data, losses = rows([conversation, caption], 8), []
        for name, weight in (("without", 0.3), ("plain", 0.0)):
            trainer = make(data.add_column("structure", [False] * 8), path=name, structure_weight=weight)
            trainer.train()
            losses.append(history(trainer, "loss"))
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)

    def test_rows_without_generative_loss(self, make):
        data = rows([conversation, caption], 8)
        compared = data.add_column("generative", [False] * 8)
        first = {}
        for name, dataset in (("both", data), ("compared", compared)):
            trainer = make(dataset, path=name, eval_dataset=compared)
            trainer.train()
            first[name] = {
                key: history(trainer, key)[0] for key in ("generative_loss", "structure_loss", "contrastive_loss")
            }
        assert math.isfinite(trainer.evaluate()["eval_loss"])
        assert first["compared"] == {**first["both"], "generative_loss": 0} != first["both"]


def test_structure_loss_of_rows_and_singles(trainer):
    """Every label by itself: the kernel of two sequences of teacher embeddings, brought to the scale of its kind of pair."""
    data, loss = trainer.train_dataset, trainer.discriminative_loss
    batch = trainer.data_collator([data[i] for i in range(4)])
    modality, beside, known = (batch[name] for name in ("slice_modality", "single_slices", "teacher_embeddings"))
    spans = [(i, 0, n + 1) for i, row in enumerate(modality) for n in range((row >= 0).sum())]
    spans += [(i, n, n + 1) for i, row in enumerate(beside.tolist()) for n in row if n > 0]
    vectors = F.normalize(randn(len(spans), 8), dim=1)
    prefixes, singles = torch.zeros(*modality.shape, 8).double(), torch.zeros(*beside.shape, 8).double()
    for vector, (i, first, end) in zip(vectors, spans):
        if first == 0:
            prefixes[i, end - 1] = vector
        else:
            singles[i, beside[i].tolist().index(first)] = vector

    def label(a, b):
        (i, first, end), (j, other, last) = a, b
        if i == j and (a == b or first == other == 0):
            return 1.0
        if i == j and first * other == 0 and (end == last or (end if first == 0 else last) == max(first, other)):
            return 1.0  # a slice, and the prefix that ends with it or before it
        sequences = torch.cat([known[i, first:end], known[j, other:last]])
        sizes = (end - first, last - other)
        table, _ = label_matrix(
            sequences,
            torch.tensor([0, sizes[0], sum(sizes)]),
            torch.tensor([[0, sizes[0]], [1, sizes[1]]]),
            modality=torch.cat([modality[i, first:end], modality[j, other:last]]),
            split=trainer._split,
        )
        kinds = [("text", "image")[modality[i, end - 1]], ("text", "image")[modality[j, last - 1]]]
        several = sum(size > 1 for size in sizes)
        name = ("-".join(sorted(kinds)), "single-sequence", "sequence-sequence")[several]
        mean, spread = loss.statistics[BLOCKS.index(name)].tolist()
        return max(-1.0, min(1.0, 0.2 * (table[0, 1].item() - mean) / spread))

    expected = sum(
        (vectors[m] @ vectors[n] - label(a, b)).item() ** 2 for m, a in enumerate(spans) for n, b in enumerate(spans)
    )
    settings = replace(trainer.args, positions_per_sample=99)
    found = DiscriminativeLoss(settings, trainer._split, loss.statistics)(prefixes, known, modality, singles, beside)[
        1
    ]
    assert found["structure_loss"].item() == pytest.approx(expected / len(spans), rel=1e-4)


class TestMatryoshka:
    @pytest.mark.parametrize("losses", ["structure", "contrastive", "both"])
    def test_the_mean_over_lengths(self, trainer, losses):
        data = trainer.train_dataset
        batch = trainer.data_collator([data[i] for i in range(6)])
        known, modality, beside = (batch[name] for name in ROW_COLUMNS)
        prefixes, singles = randn(*modality.shape, 8), randn(*beside.shape, 8, seed=1)

        def compare(dim, dims=None):
            settings = replace(trainer.args, discriminative_loss=losses, matryoshka_dims=dims, positions_per_sample=99)
            loss = DiscriminativeLoss(settings, trainer._split, trainer.discriminative_loss.statistics)
            value, found = loss(prefixes[..., :dim], known, modality, singles[..., :dim], beside)
            return torch.stack([value, *(found[name] for name in sorted(found) if name.endswith("_loss"))])

        apart = torch.stack([compare(dim) for dim in (2, 3, 8)])
        assert torch.pdist(apart[:, :1].contiguous()).min() > 1e-3
        for dims in ([2, 3], [3, 2, 8]):  # the whole length is always among them
            assert torch.allclose(compare(8, dims), apart.mean(dim=0), rtol=1e-6)

    def test_lengths_travel_with_the_model(self, make, tmp_path):
        data = rows([caption], 8)
        trainer = make(data, path="nested", lora=True, matryoshka_dims=[4, 8], max_steps=1)
        trainer.train()
        trainer.save_model()
        model = SugarForConditionalGeneration.from_pretrained(tmp_path / "nested")
        assert model.config.matryoshka_dims == [16, 8, 4]
        card = (tmp_path / "nested" / "README.md").read_text()
        assert "may be cut to 8, 4 dimensions" in card and "| `matryoshka_dims` | [16, 8, 4] |" in card
        # they are kept by further training, unless others are asked for
        for given, kept in ((None, [16, 8, 4]), ([2], [16, 2])):
            again = make(data, model=model, matryoshka_dims=given)
            assert again.discriminative_loss.args.matryoshka_dims == kept
            model = again.model.get_base_model()
        for wrong in ([17], [0, 4]):
            with pytest.raises(ValueError, match="`matryoshka_dims` is .* the model's embeddings have 16 dimensions"):
                make(data, matryoshka_dims=wrong)


class TestCachedGradients:
    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_equal_those_of_the_whole_matrix(self, trainer, dropout):
        """In float64; with dropout against the same random numbers."""
        model = copy.deepcopy(trainer.model).double().train()
        for layer in model.base_model.language_model.layers:
            layer.self_attn.attention_dropout = dropout
        data = trainer.train_dataset
        batches = [trainer.data_collator([data[i] for i in range(n, n + 3)]) for n in (0, 3, 6)]
        for batch in batches:
            batch.update({name: batch[name].double() for name in ("pixel_values", "teacher_embeddings")})
            if "pixel_values" in batch.get("singles", {}):
                batch["singles"]["pixel_values"] = batch["singles"]["pixel_values"].double()
        gradients = []
        for cached in (False, True):
            torch.manual_seed(0)
            model.zero_grad()
            if cached:
                compare_ahead(model, batches, trainer.discriminative_loss, gather=True)
            compared, table = [batch.pop("compared", None) for batch in batches], []
            for batch, known in zip(batches, compared):
                inputs = {name: value for name, value in batch.items() if name not in (*ROW_COLUMNS, "labels")}
                if known is None:
                    embeddings = embed_rows(model, **inputs)
                else:
                    with known.random_numbers():
                        embeddings = embed_rows(model, **inputs)
                table.append(discriminative_rows(*embeddings, *(batch[name] for name in ROW_COLUMNS)))
                if known is not None:
                    (known(*table[-1])[0] / known.batches).backward()
            if not cached:
                trainer.discriminative_loss(*pad_rows(table), training=True)[0].backward()
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
        for name, expected in gradients[0].items():
            assert torch.allclose(gradients[1][name], expected, rtol=1e-9, atol=1e-12 * expected.abs().max()), name

    @pytest.mark.parametrize("lora", [False, True])
    def test_an_update_is_that_of_the_large_batch(self, make, lora):
        """The generative loss too; with gradient checkpointing."""
        weights = []
        for batch, matrix in ((12, None), (4, 12)):
            sizes = {"per_device_train_batch_size": batch, "matrix_batch_size": matrix}
            settings = {"gradient_checkpointing": matrix is not None, "optim": "sgd", "max_steps": 2}
            trainer = make((conversation, caption, story), lora=lora, path=str(batch), **sizes, **settings)
            trainer.train()
            assert history(trainer, "samples_compared") == [12, 12]
            weights.append([history(trainer, name) for name in ("loss", "structure_loss", "contrastive_loss")])
            weights[-1] += [p.detach() for p in trainer.model.parameters() if p.requires_grad]
        for first, second in zip(*weights):
            first, second = torch.as_tensor(first), torch.as_tensor(second)
            assert torch.allclose(first, second, rtol=1e-5, atol=1e-5)

    def test_both_passes_have_the_precision_of_the_run(self, make):
        trainer, seen = make((caption, story), bf16=True, matrix_batch_size=8, max_steps=1), []
        trainer.model.base_model.language_model.layers[0].mlp.up_proj.register_forward_hook(
            lambda module, inputs, output: seen.append((torch.is_grad_enabled(), output.dtype))
        )
        trainer.train()
        assert seen == [*4 * [(False, torch.bfloat16)], *4 * [(True, torch.bfloat16)]]

    def test_resumed_within_an_epoch(self, make, tmp_path):
        """The last window of an epoch of five batches is short; positions, dropout and singles are drawn as ever."""
        settings = {"matrix_batch_size": 8, "positions_per_sample": 2, "max_steps": 5, "warmup_steps": 0}
        settings |= {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}

        def losses(path, checkpoint=None):
            peft_config = LoraConfig(r=4, lora_dropout=0.2)
            trainer = make(rows([conversation, caption, story], 20), path=path, peft_config=peft_config, **settings)
            trainer.train(checkpoint and str(tmp_path / checkpoint))
            return [history(trainer, name) for name in ("generative_loss", "structure_loss", "contrastive_loss")]

        whole = losses("whole")
        for step in (1, 4):  # in the first epoch and in the second
            assert losses("resumed", f"whole/checkpoint-{step}") == [pytest.approx(loss, rel=1e-5) for loss in whole]

    def test_sizes_that_do_not_fit(self, tmp_path):
        with pytest.raises(
            ValueError, match=r"`matrix_batch_size` is 10: .* multiple of `per_device_train_batch_size`"
        ):
            config(tmp_path, matrix_batch_size=10)
        with pytest.raises(ValueError, match=r"`gradient_accumulation_steps` \(3\) 1 or a multiple"):
            config(tmp_path, matrix_batch_size=8, gradient_accumulation_steps=3)
        assert config(tmp_path, matrix_batch_size=8).gradient_accumulation_steps == 2
