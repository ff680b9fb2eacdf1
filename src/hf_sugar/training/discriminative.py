"""The discriminative loss of a batch: which positions are compared with one another, and what is known of each pair."""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging

from hf_sugar.alignment import IMAGE, TEXT
from hf_sugar.alignment.calibration import calibrate

from .config import SugarTrainingConfig
from .contrastive import ContrastiveLoss
from .gather import gather_rows
from .labels import draw_positions, span_labels
from .loss import StructureLoss


logger = logging.get_logger(__name__)

# What a sequence that stands beside its row is, if it is no slice of it.
POSITIVE, NEGATIVE, NOTHING = -1, -2, -3
# What [`SugarCollator`] says of rows beside the model's inputs.
ROW_COLUMNS = ("teacher_embeddings", "slice_modality", "single_slices")
# What fills up the tensors that [`discriminative_rows`] gives.
PADDING = (0, 0, -1, 0, NOTHING)


def discriminative_rows(
    embeddings: torch.Tensor,
    single_embeddings: torch.Tensor | None,
    teacher_embeddings: torch.Tensor,
    modality: torch.Tensor,
    single_slices: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """What [`DiscriminativeLoss`] takes, a line for each row: the embeddings of the sequences beside them
    `(singles, dim)` are divided among the rows."""
    if single_slices is None:
        single_slices = modality.new_empty(len(modality), 0)
    singles = embeddings.new_zeros(*single_slices.shape, embeddings.shape[-1])
    if single_embeddings is not None:
        places = (single_slices > NOTHING).nonzero()
        singles = singles.index_put(tuple(places.T), single_embeddings[: len(places)])  # none of a blank sequence
    return embeddings, teacher_embeddings, modality, singles, single_slices


def pad_rows(batches: Iterable[Iterable[torch.Tensor]]) -> list[torch.Tensor]:
    """One batch of the rows of several, each as [`discriminative_rows`] gives them."""
    return [
        pad_sequence([row for column in columns for row in column], True, padding)
        for columns, padding in zip(zip(*batches), PADDING)
    ]


class DiscriminativeLoss(nn.Module):
    """The discriminative loss of a batch, `structure_loss + contrastive_weight * contrastive_loss`, over ends of slices
    drawn from each row, and the sequences that stand beside the rows. It is L_d of Eq. 1 of
    [Sugar](https://huggingface.co/papers/2411.00304), whose Eq. 3 is the structure loss; the rest belongs to this
    library. With `matryoshka_dims` both are means over embeddings cut to each of these lengths and whole
    ([Matryoshka](https://huggingface.co/papers/2205.13147), where they are sums). `split` is that of
    [`~hf_sugar.alignment.label_matrix`]; the `statistics` `(5, 2)` are from [`label_statistics`], and may be missing
    where the labels stay as they are and nothing is contrasted."""

    def __init__(self, args: SugarTrainingConfig, split: int | None = None, statistics: torch.Tensor | None = None):
        super().__init__()
        self.args, self.split, self.statistics = args, split, statistics
        self.structure = StructureLoss(args.structure_reduction) if args.discriminative_loss != "contrastive" else None
        self.contrastive = None
        if args.discriminative_loss != "structure":
            self.contrastive = ContrastiveLoss(args.contrastive_temperature)

    def forward(self, embeddings, teacher_embeddings, modality, singles, single_slices, training=False, gather=False):
        """The loss, and a `dict` of what is logged, from what [`discriminative_rows`] gives: embeddings `(samples, slices, dim)` of
        the model at the ends of slices, teacher embeddings and modality of these, and embeddings `(samples, singles, dim)` of
        the sequences beside each row and which slice each is. In training positions are drawn at random; with `gather` the
        samples are those of all processes."""
        spans, embeddings = self._draw(embeddings, modality, singles, single_slices, training)
        if gather:
            samples = gather_rows(spans.new_tensor([[len(modality)]]))  # of each process
            spans[:, 0] += samples[: dist.get_rank() if dist.is_initialized() else 0].sum()
            embeddings, spans = gather_rows(embeddings), gather_rows(spans)
            teacher_embeddings, modality = gather_rows(teacher_embeddings), gather_rows(modality, padding=-1)
        samples = int((modality >= 0).any(dim=1).sum())
        if samples == 1 and training and not self.args.allow_single_sample:
            logger.warning_once(
                "A label matrix held the positions of one sample alone: no discriminative loss for it."
            )
        if samples < 2 and not self.args.allow_single_sample:
            spans, embeddings = spans[:0], embeddings[:0]

        dims = {embeddings.shape[1], *(self.args.matryoshka_dims or [])}

        def over_lengths(loss: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
            return sum(loss(embeddings[:, :dim]) for dim in dims) / len(dims)

        values, loss = {"samples_compared": embeddings.new_tensor(samples)}, (embeddings * 0).sum()
        taught = spans[:, 1] >= 0  # what the user gives beside a row has no teacher embeddings
        labels, blocks, clamped = span_labels(spans[taught], teacher_embeddings, modality, self.args, self.split)
        values["labels_clamped"] = embeddings.new_tensor(clamped)
        if self.structure is not None:
            calibrated = self.args.label_calibration == "blocks"
            targets = calibrate(labels, blocks, self.statistics) if calibrated else labels
            targets = targets.masked_fill(_same(spans[taught]), 1)
            loss = over_lengths(lambda cut: self.structure(cut[taught], targets))
            values["structure_loss"] = loss.detach()
        if self.contrastive is not None:
            mean = self.statistics.to(labels)[blocks, 0]  # of such pairs
            alike = labels - mean >= self.args.contrastive_mask_above * (1 - mean)
            near = torch.eye(len(spans), dtype=torch.bool, device=spans.device)
            near[taught.nonzero(), taught.nonzero().T] |= alike
            contrastive = over_lengths(lambda cut: self._contrast(cut, spans, modality, near))
            values["contrastive_loss"] = contrastive.detach()
            loss = loss + self.args.contrastive_weight * contrastive
        return loss, values

    def _draw(self, embeddings, modality, singles, single_slices, training):
        """The positions that are compared, first of all those before a slice that stands alone, and these slices: the span
        of each, and its embedding."""
        row, column = (single_slices > NOTHING).nonzero(as_tuple=True)
        kind = single_slices[row, column]
        before = torch.where(kind > 0, kind, (modality >= 0).sum(dim=1)[row]) - 1
        wanted = torch.zeros_like(modality, dtype=torch.bool)
        wanted[row, before] = True
        sample, number = draw_positions(modality, self.args.positions_per_sample, not training, wanted)
        prefixes = torch.stack([sample, torch.zeros_like(number), number + 1], dim=1)
        spans = torch.cat([prefixes, torch.stack([row, kind, kind + 1], dim=1)])
        return spans, torch.cat([embeddings[sample, number], singles[row, column]])

    def _contrast(self, embeddings, spans, modality, near):
        """A prefix and its next slice alone, or what its row gives as a positive, belong together; so do an image and every
        text since the image before it: a question about a picture and the next picture of the same. The first slices of
        rows are slices alone that nothing belongs to."""
        sample, first, end = spans.T
        prefix, beside = (first == 0).nonzero()[:, 0], ((first != 0) | (end == 1)).nonzero()[:, 0]
        whole = end == (modality >= 0).sum(dim=1)[sample]
        images = F.pad((modality == IMAGE).cumsum(dim=1), (1, 0))  # among the first slices of a row
        before, included = (images[sample, number.clamp(min=0)] for number in (first, end))
        image = (first > 0) & (included > before)
        text = modality[sample, (end - 1).clamp(min=0)] == TEXT
        belongs = (end[:, None] == first) | (whole[:, None] & (first == POSITIVE))
        belongs |= text[:, None] & image & (included[:, None] == before)
        row = sample[:, None] == sample
        positives = (belongs & row)[prefix][:, beside]
        prefix, positives = prefix[positives.any(dim=1)], positives[positives.any(dim=1)]
        # No negatives are candidates that the teachers call nearly the same as a positive one, and queries likewise. The label
        # of two prefixes of a sample says nothing of that: it is 1.
        alike = near[prefix][:, prefix] & ~row[prefix][:, prefix]
        ignored = positives.float() @ near[beside][:, beside].float() + alike.float() @ positives.float() > 0
        ignored |= row[prefix][:, beside] & (first[beside] == 0)
        return self.contrastive(embeddings[prefix], embeddings[beside], positives, ignored & ~positives)


def _same(spans: torch.Tensor) -> torch.Tensor:
    """Pairs of positions of one sample whose label is 1: two prefixes; and a slice alone with the prefix that ends with it or
    before it. Two slices alone, or one that lies further back, are as similar as the teachers say."""
    sample, first, end = spans.T
    prefix = first == 0
    beside = prefix[:, None] & ((end[:, None] == end) | (end[:, None] == first))
    equal = (first[:, None] == first) & (end[:, None] == end)
    return (sample[:, None] == sample) & ((prefix[:, None] & prefix) | beside | beside.T | equal)
