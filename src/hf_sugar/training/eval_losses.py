from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from accelerate import Accelerator

from hf_sugar.data.images import answers_to_image, load_image
from hf_sugar.evaluation.tasks import image_text_retrieval
from hf_sugar.models.rows_sugar import conversation_row, row_name

from .discriminative import PADDING, pad_rows
from .gather import gather_rows


class EvalLosses:
    """Losses of the rows of an evaluation, the same however they are batched and divided among processes: the generative
    loss is a mean over tokens, and label matrices are of `size` rows that follow one another. `discriminative_loss` takes
    what [`~training.discriminative.discriminative_rows`] gives of them, and gives their loss and a `dict` of what is
    logged."""

    def __init__(self, accelerator: Accelerator, size: int, discriminative_loss: Callable | None = None):
        self.accelerator = accelerator
        self.size = size
        self.discriminative_loss = discriminative_loss
        self.rows: list[tuple[torch.Tensor, ...]] = []  # of all processes, not compared yet
        # of values times their weights, and of the weights
        self.sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(2, device=accelerator.device))

    def new_rows(self, rows: int) -> int:
        """How many of so many rows are new: accelerate fills up the last batches of several processes with rows that were
        there already."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return rows
        return max(0, state.remainder - self.accelerator.process_index * rows)

    def add(self, generative_loss: torch.Tensor, tokens: torch.Tensor, *columns: torch.Tensor):
        """What is known of a batch: loss and number of tokens, and where there is a structure loss what that takes."""
        self.sums["generative_loss"] += torch.stack([generative_loss * tokens, tokens])
        if self.discriminative_loss is not None:
            new = self.new_rows(len(columns[0]))
            self.rows += zip(*(gather_rows(x[:new], padding) for x, padding in zip(columns, PADDING)))
            while len(self.rows) >= self.size:
                self._compare()

    def _compare(self):
        rows, self.rows = self.rows[: self.size], self.rows[self.size :]
        _, values = self.discriminative_loss(*pad_rows(([x] for x in row) for row in rows))
        for name, value in values.items():
            self.sums[name] += torch.stack([value * len(rows), value.new_tensor(len(rows))])

    def means(self) -> dict[str, float]:
        """The losses, when all batches have been added."""
        if self.rows:
            self._compare()
        self.sums["generative_loss"] = self.accelerator.reduce(self.sums["generative_loss"])
        return {name: (value / weight).item() for name, (value, weight) in self.sums.items() if weight}


def retrieval_of_rows(dataset: Iterable[dict], embed: Callable, count: int) -> dict[str, float]:
    """Recall@1 between the images and the answers (or captions) of the first rows, at most so many, that have one of each."""
    images, texts = [], []
    for index, row in enumerate(map(conversation_row, dataset)):
        answers = answers_to_image(row)
        if len(answers) == 1:
            images.append(load_image(row["images"][0], row_name(row, index)))
            texts += answers
        if len(images) == count:
            break
    if len(images) < 2:
        return {}
    results = image_text_retrieval(embed, images, texts, ks=(1,))
    return {name: results[name].value for name in ("image_to_text_recall@1", "text_to_image_recall@1")}
