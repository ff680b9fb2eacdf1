import heapq
import math
from collections.abc import Sequence

import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import Sampler
from tqdm.auto import tqdm
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler

from hf_sugar.data.checks import text_rows
from hf_sugar.data.images import image_size, undecoded
from hf_sugar.models import SugarProcessor
from hf_sugar.models.rows_sugar import row_text

from .config import SugarTrainingConfig


class LengthGroups(LengthGroupedSampler):
    """Upstream goes from long to short batches again and again, so that the kinds of rows come in turns; here the batches
    are shuffled."""

    def __iter__(self):
        indices = list(super().__iter__())
        whole = len(indices) // self.batch_size
        batches = [indices[n * self.batch_size : (n + 1) * self.batch_size] for n in range(whole)]
        order = torch.randperm(whole).tolist()
        yield from [index for n in order for index in batches[n]] + indices[whole * self.batch_size :]


class TokenBatches(BatchRebalanceSampler):
    """Batches of one process that hold at most so many tokens. All batches of an epoch hold nearly as many as one
    another, so that no process waits; each epoch has every row once, in other batches, and as many of them. (Upstream's
    own sampler keeps to a number of rows, and the trainer takes one of its class for a sampler that knows its process.)
    `lengths` are the tokens of each row, and `epoch` a tensor that holds the number of the epoch, because upstream's
    `set_epoch` does not reach a run that several processes resume (transformers 5.24)."""

    drop_last = True  # there is no rest: the number of batches is a multiple of that of processes

    def __init__(
        self, lengths: list[int], epoch: torch.Tensor, max_batch_tokens: int, seed: int, rank: int, world_size: int
    ):
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        if lengths[longest] > max_batch_tokens:
            raise ValueError(
                f"`max_batch_tokens` is {max_batch_tokens}, and train_dataset[{longest}] alone has {lengths[longest]} tokens."
            )
        # rounded up to five bits: rows of about the same length take each other's place in other epochs
        steps = [1 << max(0, length.bit_length() - 5) for length in lengths]
        self.lengths = [min(-(-n // step) * step, max_batch_tokens) for n, step in zip(lengths, steps)]
        self.current, self.seed, self.rank, self.world_size = epoch, seed, rank, world_size
        fewest, self.batches = sum(self.lengths) / max_batch_tokens, 0
        # what is in a batch differs from epoch to epoch, how full it is does not
        while not self.batches or max(self._filled(range(len(lengths))))[0] > max_batch_tokens:
            self.batches = math.ceil(max(fewest, 1.02 * self.batches + 0.5) / world_size) * world_size
        if self.batches > len(lengths):
            raise ValueError(f"{len(lengths)} rows are too few for {world_size} processes.")

    def _filled(self, order: Sequence[int]) -> list[tuple[int, int, list[int]]]:
        """Each row, from long to short, goes to the batch that is emptiest."""
        batches = [(0, number, []) for number in range(self.batches)]
        for index in sorted(order, key=self.lengths.__getitem__, reverse=True):
            total, number, rows = batches[0]
            rows.append(index)
            heapq.heapreplace(batches, (total + self.lengths[index], number, rows))
        return batches

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + int(self.current))
        batches = self._filled(torch.randperm(len(self.lengths), generator=generator).tolist())
        order = torch.randperm(self.batches, generator=generator).tolist()
        yield from (batches[n][2] for n in order[self.rank :: self.world_size])

    def __len__(self):
        return self.batches // self.world_size


def train_sampler(
    dataset: Dataset | IterableDataset, args: SugarTrainingConfig, processor: SugarProcessor, epoch: torch.Tensor
) -> Sampler | None:
    """The sampler of a training by the lengths of its rows, if that is asked for; `epoch` is the number of the epoch."""
    by_length = args.max_batch_tokens or args.train_sampling_strategy == "group_by_length"
    if not by_length or not isinstance(dataset, Dataset):
        return None
    lengths = row_lengths(dataset, processor)
    if args.max_batch_tokens:
        return TokenBatches(lengths, epoch, args.max_batch_tokens, args.seed, args.process_index, args.world_size)
    # rounded up to powers of two, so that rows of about the same length stay mixed: the structure loss compares them
    lengths = [1 << length.bit_length() for length in lengths]
    return LengthGroups(args.train_batch_size * args.gradient_accumulation_steps, lengths=lengths)


def row_lengths(dataset: Dataset, processor: SugarProcessor) -> list[int]:
    """Tokens of rows, images expanded; see [`~models.SugarProcessor.count_tokens`]. Files of images are opened, for their
    sizes, if the processor makes more tokens of a larger image."""
    square, wide = processor.count_tokens(["", ""], [[(336, 336)], [(672, 1344)]])
    column = next((name for name in ("images", "image") if name in dataset.column_names), None)
    pictures = undecoded(dataset).select_columns(column) if column and square != wide else None
    texts, sizes, lengths = [], [], []
    rows = tqdm(text_rows(dataset), desc="counting tokens", unit=" rows", total=len(dataset), delay=5)
    for index, (row, images) in enumerate(rows):
        texts.append(row_text(row))
        found = pictures[index][column] if pictures is not None and images else [None] * images
        found = found if isinstance(found, list) else [found]
        sizes.append([(336, 336) if image is None else image_size(image) for image in found])
        if len(texts) == 1000 or index + 1 == len(dataset):
            lengths += processor.count_tokens(texts, sizes)
            texts, sizes = [], []
    return lengths
