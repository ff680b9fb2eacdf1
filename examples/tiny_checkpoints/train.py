"""
Training of tiny checkpoints of real architectures, from nothing, on a CPU in minutes. Every function takes any data of
its kind and returns a model in float32 and its processor, which `save_checkpoint` saves for `from_pretrained`.
"""

import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from tqdm.auto import tqdm
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

# the names without "Pil" need torchvision; the files they save are the same
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hf_sugar.models.processing_sugar import SLICE_TEMPLATE


WIDTH, LAYERS, PATCH, VOCABULARY = 128, 3, 8, 768
SHAPE = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": WIDTH // 32}
ENGLISH = """
A user asks about one or more images and the assistant answers. Please look at the picture and say what you can see in it.
The first image shows the same thing as the second one, but from another side. Which of these pictures fits the sentence best?
Who is in the photograph, what are they doing, where are they, when was it taken, and why? I think that it was made by hand.
Some people like to walk with their dog in the park; others would rather stay at home, read a book and drink a cup of tea.
He said that she could not come because her train was late. They had been there before, and they will go there again next year.
You may use any of these words, or none at all. Yes, it is true. No, it is not. Thank you for your help, and have a good day!
""".strip().splitlines()


def save_checkpoint(model: PreTrainedModel, processor, directory: str | os.PathLike) -> Path:
    """Saves a model in float16 and its processor, replacing the folder as a whole."""
    directory = Path(directory)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    model.half().save_pretrained(temporary)
    model.float()
    processor.save_pretrained(temporary)
    if directory.exists():
        shutil.rmtree(directory)
    os.replace(temporary, directory)
    return directory


def build_tokenizer(texts: Iterable[str], encoder: bool, model_max_length: int) -> PreTrainedTokenizerFast:
    """
    Trains a byte-level BPE tokenizer, which can encode any text. A little ordinary English is added to `texts`. For an
    `encoder`, texts are put in lower case and between `<s>` and `</s>`; otherwise nothing is added.
    """
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    if encoder:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # not id 2 for the end: CLIP takes it for a mark of old configurations and then pools at the largest id instead
    special = ["<pad>", "<s>", "<unk>", "</s>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *ENGLISH], trainer)
    if encoder:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 3)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=["<image>"],
        cls_token="<s>",
        sep_token="</s>",
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=model_max_length,
    )


def fit(model, loss_of: Callable[[int], torch.Tensor], steps: int, lr: float, description: str) -> list[float]:
    """AdamW with warm-up and a cosine schedule; `loss_of` makes the loss of a step. Returns the losses."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.98)
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, round(0.04 * steps)), steps)
    model.train()
    losses = []
    for step in (bar := tqdm(range(steps), desc=description, unit="step")):
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    model.eval()
    return losses


def epochs(size: int, batch_size: int, generator: torch.Generator, block: int = 1) -> Iterator[torch.Tensor]:
    """Random batches without end. Rows that follow each other in blocks of `block` stay together."""
    blocks = torch.arange(size - size % block).view(-1, block)
    while True:
        order = blocks[torch.randperm(len(blocks), generator=generator)].flatten()
        yield from order.split(batch_size)[: max(1, len(order) // batch_size)]


def to_pixels(images: Sequence[Image.Image], image_processor) -> torch.Tensor:
    """`(images, 3, height, width)` float32."""
    chunks = [
        image_processor(images=list(images[i : i + 256]), return_tensors="pt")["pixel_values"]
        for i in tqdm(range(0, len(images), 256), desc="images", unit="batch")
    ]
    return torch.cat(chunks)


def contrast(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor | float, codes: torch.Tensor | None = None):
    """Symmetric InfoNCE of normalised rows. Rows of equal `codes` are no negatives of each other."""
    logits = scale * a @ b.T
    if codes is not None:
        same = codes[:, None] == codes[None]
        logits = logits.masked_fill(same & ~torch.eye(len(a), dtype=torch.bool), float("-inf"))
    target = torch.arange(len(a))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def image_size(image: Image.Image) -> int:
    if image.width != image.height:
        raise ValueError(f"images must be square to choose the size of the encoder, got {image.width}x{image.height}.")
    return image.width


def encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    batch = tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True, max_length=64)
    return batch["input_ids"], batch["attention_mask"]


def text_codes(texts: Sequence[str]) -> torch.Tensor:
    """Equal texts have equal codes."""
    known = {}
    return torch.tensor([known.setdefault(text, len(known)) for text in texts])


def train_clip(
    images: Sequence[Image.Image],
    texts: Sequence[str],
    *,
    steps: int,
    batch_size: int = 256,
    block: int = 1,
    lr: float = 1.5e-3,
    max_scale: float = 20.0,
    seed: int = 0,
) -> tuple[CLIPModel, CLIPProcessor, list[float]]:
    """
    Trains a CLIP of square images and their texts, tokenizer included. Returns model, processor and losses.

    An image is no negative of a text equal to its own. Pairs that follow each other in blocks of `block` stay in one
    batch, which is where hard negatives go. `max_scale` bounds the inverse temperature: kept low, it spreads the cosines.
    """
    size = image_size(images[0])
    tokenizer = build_tokenizer(texts, encoder=True, model_max_length=77)
    processor = CLIPProcessor(CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size), tokenizer)
    shape = {**SHAPE, "intermediate_size": 2 * WIDTH, "projection_dim": WIDTH}
    text = {"bos_token_id": 1, "pad_token_id": 0, "eos_token_id": 3, "vocab_size": len(tokenizer)}
    torch.manual_seed(seed)
    model = CLIPModel(
        CLIPConfig(
            text_config={**shape, **text, "max_position_embeddings": 77},
            vision_config={**shape, "image_size": size, "patch_size": PATCH},
            projection_dim=WIDTH,
        )
    )
    pixels = to_pixels(images, processor.image_processor)
    input_ids, attention_mask = encode(texts, tokenizer)
    codes = text_codes(texts)
    batches = epochs(len(pixels), batch_size, torch.Generator().manual_seed(seed), block)

    def loss_of(step: int) -> torch.Tensor:
        rows = next(batches)
        length = int(attention_mask[rows].sum(1).max())
        out = model(
            input_ids=input_ids[rows, :length], attention_mask=attention_mask[rows, :length], pixel_values=pixels[rows]
        )
        scale = model.logit_scale.exp().clamp(max=max_scale)
        return contrast(out.image_embeds, out.text_embeds, scale, codes[rows])

    losses = fit(model, loss_of, steps, lr, "clip")
    model.logit_scale.data.clamp_(max=math.log(max_scale))
    return model, processor, losses


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Moves by up to a sixteenth, changes brightness, adds noise, cuts out a square. Never flips, never changes hue."""
    count, _, height, width = pixels.shape

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    reach = max(1, width // 16)
    padded = F.pad(pixels, (reach,) * 4, mode="replicate")
    dy, dx = torch.randint(0, 2 * reach + 1, (2, count, 1), generator=generator)
    rows = (torch.arange(height) + dy)[:, None, :, None]
    columns = (torch.arange(width) + dx)[:, None, None, :]
    out = padded[torch.arange(count)[:, None, None, None], torch.arange(3)[:, None, None], rows, columns]
    out = out * uniform(0.9, 1.1, count, 1, 1, 1) + uniform(-0.1, 0.1, count, 1, 1, 1)
    out = out + 0.08 * torch.randn(out.shape, generator=generator)
    cut = max(2, width // 6)
    top, left = (torch.randint(0, width - cut, (count, 1), generator=generator) for _ in range(2))
    inside_y = (torch.arange(height) >= top) & (torch.arange(height) < top + cut)
    inside_x = (torch.arange(width) >= left) & (torch.arange(width) < left + cut)
    hole = (inside_y[:, :, None] & inside_x[:, None, :])[:, None]
    return out.masked_fill(hole & (uniform(0, 1, count, 1, 1, 1) < 0.5), 0.0)


def train_dinov2(
    images: Sequence[Image.Image],
    *,
    steps: int,
    others: Sequence[Image.Image] | None = None,
    batch_size: int = 128,
    lr: float = 1e-3,
    scale: float = 8.0,
    seed: int = 0,
) -> tuple[Dinov2Model, BitImageProcessorPil, list[float]]:
    """
    Trains a DINOv2 encoder of square images without labels: two views of an image are to be alike and those of different
    images not; with `others`, another picture of what each image shows, a view of either. The class token carries the
    embedding. Returns model, processor and losses.
    """
    size = image_size(images[0])
    processor = BitImageProcessorPil(size={"shortest_edge": size}, crop_size=size)
    torch.manual_seed(seed)
    model = Dinov2Model(Dinov2Config(**SHAPE, mlp_ratio=2, image_size=size, patch_size=PATCH))
    pixels = to_pixels(images, processor)
    other_pixels = pixels if others is None else to_pixels(others, processor)
    generator = torch.Generator().manual_seed(seed)
    batches = epochs(len(pixels), batch_size, generator)

    def loss_of(step: int) -> torch.Tensor:
        batch = next(batches)
        views = torch.cat([augment(each[batch], generator) for each in (pixels, other_pixels)])
        a, b = F.normalize(model(pixel_values=views).pooler_output, dim=-1).chunk(2)
        return contrast(a, b, scale)

    return model, processor, fit(model, loss_of, steps, lr, "dinov2")


def train_bert(
    text_pairs: Sequence[tuple[str, str]],
    *,
    steps: int,
    batch_size: int = 128,
    block: int = 1,
    lr: float = 1e-3,
    scale: float = 12.0,
    seed: int = 0,
) -> tuple[BertModel, PreTrainedTokenizerFast, list[float]]:
    """
    Trains a BERT sentence encoder of pairs that mean the same, tokenizer included (of the same text twice, dropout makes
    the difference). The class token carries the embedding. `block` as in [`train_clip`]. Returns model, tokenizer and
    losses.
    """
    first, second = zip(*text_pairs, strict=True)
    tokenizer = build_tokenizer(first + second, encoder=True, model_max_length=512)
    torch.manual_seed(seed)
    model = BertModel(
        BertConfig(
            **SHAPE,
            vocab_size=len(tokenizer),
            intermediate_size=2 * WIDTH,
            max_position_embeddings=512,
            pad_token_id=tokenizer.pad_token_id,
        ),
        add_pooling_layer=False,
    )
    input_ids, attention_mask = encode(first + second, tokenizer)
    input_ids, attention_mask = input_ids.view(2, len(first), -1), attention_mask.view(2, len(first), -1)
    codes = text_codes(first)
    batches = epochs(len(first), batch_size, torch.Generator().manual_seed(seed), block)

    def loss_of(step: int) -> torch.Tensor:
        rows = next(batches)
        length = int(attention_mask[:, rows].sum(-1).max())
        ids, mask = input_ids[:, rows, :length].flatten(0, 1), attention_mask[:, rows, :length].flatten(0, 1)
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        a, b = F.normalize(hidden[:, 0], dim=-1).chunk(2)
        return contrast(a, b, scale, codes[rows])

    return model, tokenizer, fit(model, loss_of, steps, lr, "bert")


def loss_spans(row: dict, text: str) -> list[tuple[int, int]]:
    """Where, in the rendered row, the text lies that carries the loss. The end-of-text token of an answer belongs to it."""
    spans, at = [], 0
    for message in row["messages"]:
        image_before = False
        for part in message["content"]:
            if part["type"] == "image":
                image_before = True
                continue
            start = text.index(part["text"], at)
            at = start + len(part["text"])
            answer = message["role"] == "assistant"
            if {"answers": answer, "captions": image_before, "text": True}[row["loss_on"]]:
                spans.append((start, at + len("</s>") if answer else at))
    return spans


def tokenize(rows: Dataset, processor: LlavaProcessor, image_tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and labels of each row."""
    tokenizer = processor.tokenizer
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    texts = [text.replace("<image>", "<image>" * image_tokens) for text in texts]
    batch = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    out = []
    for row, text, ids, offsets in zip(rows, texts, batch["input_ids"], batch["offset_mapping"], strict=True):
        spans = loss_spans(row, text)
        labels = [
            token if any(start < end_ and end > start_ for start_, end_ in spans) else -100
            for token, (start, end) in zip(ids, offsets, strict=True)
        ]
        out.append((torch.tensor(ids), torch.tensor(labels)))
    return out


def pretrain_llava(
    rows: Dataset,
    images: Iterable[Sequence[Image.Image]],
    vision_tower: CLIPModel,
    *,
    steps: int,
    tokens_per_batch: int = 2048,
    lr: float = 2e-3,
    seed: int = 0,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor, list[float]]:
    """
    Pretrains a LLaVA by next-token prediction, tokenizer included. Returns model, processor and losses.

    Args:
        rows (`datasets.Dataset`):
            Rows with `messages` and `loss_on` (which text is predicted: `"answers"`, `"captions"` or `"text"`).
        images (`Iterable`):
            The images of each row, square and all of one size.
        vision_tower (`CLIPModel`):
            From [`train_clip`]. Its vision tower is left as it is for the first third of the steps.
        steps (`int`):
            Optimizer steps.
        tokens_per_batch (`int`, *optional*, defaults to 2048):
            Tokens in a step, image tokens and padding included.
        lr (`float`, *optional*, defaults to 2e-3):
            Peak learning rate.
        seed (`int`, *optional*, defaults to 0):
            Seed of weights and batches.
    """
    drawn, first = [], [0]
    for row in tqdm(images, desc="decoding", unit="row", total=len(rows)):
        drawn += row
        first.append(len(drawn))
    size = image_size(drawn[0])
    texts = (
        f"{message['role'].upper()}: " + " ".join(part["text"] for part in message["content"] if part["text"])
        for row in rows["messages"]
        for message in row
    )
    tokenizer = build_tokenizer(texts, encoder=False, model_max_length=2048)
    image_tokens = (size // PATCH) ** 2
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=SLICE_TEMPLATE,
    )
    tokenizer.chat_template = SLICE_TEMPLATE
    shape = {**SHAPE, "intermediate_size": 2 * WIDTH}
    ids = {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0}
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**shape, image_size=size, patch_size=PATCH, projection_dim=WIDTH),
            text_config=LlamaConfig(**shape, **ids, vocab_size=len(tokenizer), max_position_embeddings=2048),
            image_token_index=processor.image_token_id,
            image_seq_length=image_tokens,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
    )
    model.generation_config = GenerationConfig(**ids, do_sample=False, max_new_tokens=64)
    model.model.vision_tower.load_state_dict(vision_tower.vision_model.state_dict())

    encoded = tokenize(rows.select_columns(["messages", "loss_on"]), processor, image_tokens)
    pixels = to_pixels(drawn, processor.image_processor)
    lengths = torch.tensor([len(ids) for ids, _ in encoded])
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[list[int]]:
        while True:
            # rows of like length share a batch, so that little of it is padding
            order = (lengths + 8 * torch.rand(len(lengths), generator=generator)).argsort()
            cut, batch, width = [], [], 0
            for row in order.tolist():
                width = max(width, int(lengths[row]))
                if batch and width * (len(batch) + 1) > tokens_per_batch:
                    cut.append(batch)
                    batch, width = [], int(lengths[row])
                batch.append(row)
            cut.append(batch)
            for i in torch.randperm(len(cut), generator=generator).tolist():
                yield cut[i]

    stream = batches()

    def loss_of(step: int) -> torch.Tensor:
        model.model.vision_tower.requires_grad_(step >= steps // 3)
        batch = next(stream)
        pad = torch.nn.utils.rnn.pad_sequence
        input_ids = pad([encoded[i][0] for i in batch], batch_first=True, padding_value=0)
        labels = pad([encoded[i][1] for i in batch], batch_first=True, padding_value=-100)
        chosen = torch.cat([torch.arange(first[i], first[i + 1]) for i in batch])
        # padding stands to the right, where a causal model does not look: no mask is needed
        hidden = model.model(input_ids=input_ids, pixel_values=pixels[chosen], use_cache=False).last_hidden_state
        wanted = labels[:, 1:] != -100
        return F.cross_entropy(model.lm_head(hidden[:, :-1][wanted]), labels[:, 1:][wanted])

    return model, processor, fit(model, loss_of, steps, lr, "llava")
