import torch
from datasets import Dataset
from PIL import Image
from transformers.trainer_pt_utils import LengthGroupedSampler

from hf_sugar.data.checks import text_rows
from hf_sugar.models import SugarProcessor
from hf_sugar.models.rows_sugar import fill_images


class LengthGroups(LengthGroupedSampler):
    """Upstream goes from long to short batches again and again, so that the kinds of rows come in turns; here the batches
    are shuffled."""

    def __iter__(self):
        indices = list(super().__iter__())
        whole = len(indices) // self.batch_size
        batches = [indices[n * self.batch_size : (n + 1) * self.batch_size] for n in range(whole)]
        order = torch.randperm(whole).tolist()
        yield from [index for n in order for index in batches[n]] + indices[whole * self.batch_size :]


def row_lengths(dataset: Dataset, processor: SugarProcessor) -> list[int]:
    """About how long rows are: they are tokenised when they are collated, and for grouping an estimate is good enough. It is
    rounded up to a power of two, so that rows of about the same length stay mixed: the structure loss compares them."""
    image_tokens = processor.embed_inputs([Image.new("RGB", (336, 336))])["slice_ids"].eq(0).sum()
    lengths = []
    for row, images in text_rows(dataset):
        parts = [part for message in fill_images(row["messages"], [None] * images, "") for part in message["content"]]
        characters = sum(len(part["text"]) for part in parts if part["type"] == "text")
        lengths.append(1 << int(characters / 4 + images * int(image_tokens)).bit_length())
    return lengths
