"""Random models of many image-text-to-text families, each with the processor of its family."""

from contextlib import contextmanager
from functools import partial
from importlib import import_module

import pytest
import tiny
import torch
from tiny import tokenizer
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, ProcessorMixin, set_seed


def template(
    before: str, image: str, after: str, start: str = "", prompt: str = "", text: str = "part['text']"
) -> str:
    """Chat template as a family publishes it, cut down to users and assistants with images and texts."""
    parts = f"{{% if part['type'] == 'image' %}}{image}{{% else %}}{{{{ {text} }}}}{{% endif %}}"
    message = f"{before}{{% for part in message['content'] %}}{parts}{{% endfor %}}{after}"
    prompt = f"{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    return f"{start}{{% for message in messages %}}{message}{{% endfor %}}{prompt}"


def chatml(image: str) -> str:
    start = "<|im_start|>{{ message['role'] }}\n"
    return template(start, image, "<|im_end|>\n", prompt="<|im_start|>assistant\n")


IDEFICS_TEMPLATE = template(
    "{{ message['role'] | capitalize }}{% if message['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}",
    "<image>",
    "<end_of_utterance>\n",
    start="<|im_start|>",
    prompt="Assistant:",
)
GEMMA_TEMPLATE = template(
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n",
    "<start_of_image>",
    "<end_of_turn>\n",
    start="{{ bos_token }}",
    prompt="<start_of_turn>model\n",
    text="part['text'] | trim",
)
MISTRAL_TEMPLATE = template(
    "{{ '[INST]' if message['role'] == 'user' }}",
    "[IMG]",
    "{{ '[/INST]' if message['role'] == 'user' else eos_token }}",
    start="{{ bos_token }}",
)
AYA_TEMPLATE = template("<|START_OF_TURN_TOKEN|>", "<image>", "<|END_OF_TURN_TOKEN|>", start="{{ bos_token }}")

PINPOINTS = [[28, 56], [56, 28], [56, 56]]


def text(model_type: str, **kwargs) -> dict:
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    limits = dict(num_key_value_heads=2, vocab_size=416, max_position_embeddings=2048)
    tokens = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return dict(model_type=model_type) | sizes | limits | tokens | kwargs


def vision(model_type: str | None = None, **kwargs) -> dict:
    sizes = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    tower = dict(image_size=28, patch_size=14) | sizes
    return tower | ({} if model_type is None else {"model_type": model_type}) | kwargs


clip = partial(vision, "clip_vision_model", num_hidden_layers=3)
siglip = partial(vision, "siglip_vision_model", vision_use_head=False)


def pil(family: str, name: str, **kwargs):
    """The family's image processor on Pillow; the one in the public name space may want torchvision."""
    module = import_module(f"transformers.models.{family}.image_processing_pil_{family}")
    return getattr(module, f"{name}ImageProcessorPil")(**kwargs)


SQUARE = dict(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
COUNTED = dict(patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1)
LLAVA = dict(chat_template=tiny.LLAVA_TEMPLATE, **COUNTED)
TILES = dict(size={"height": 28, "width": 28}, crop_to_patches=True, min_patches=1, max_patches=4)


@contextmanager
def without_video_processor():
    """
    Lets a processor be made that has no video processor.

    The video processors want torchvision, and without it the constructor fails while it checks the class of an
    argument that images do not need. Only that check is left out; what is built is the family's own processor.
    """
    check = ProcessorMixin.check_argument_for_proper_class
    ProcessorMixin.check_argument_for_proper_class = lambda self, name, value: (
        None if name == "video_processor" else check(self, name, value)
    )
    try:
        yield
    finally:
        ProcessorMixin.check_argument_for_proper_class = check


def make_processor(family: str, name: str, image_processor, tokens, **kwargs) -> ProcessorMixin:
    cls = getattr(import_module(f"transformers.models.{family}.processing_{family}"), f"{name}Processor")
    with without_video_processor():
        if "video_processor" in cls.get_attributes():
            kwargs["video_processor"] = None
        return cls(image_processor=image_processor, tokenizer=tokens, **kwargs)


def _llava():
    config = dict(text_config=text("llama"), vision_config=clip(), image_token_index=4, image_seq_length=4)
    images = pil("clip", "CLIP", **SQUARE)
    return config, make_processor("llava", "Llava", images, tokenizer(image_token="<image>"), **LLAVA)


def _vipllava():
    config, processor = _llava()
    return config | dict(vision_config=clip(num_hidden_layers=6), vision_feature_layers=[-2, -3]), processor


def _llava_next(family="llava_next", name="LlavaNext", **tokens):
    images = pil("llava_next", "LlavaNext", image_grid_pinpoints=PINPOINTS, **SQUARE)
    processor = make_processor(family, name, images, tokenizer(image_token="<image>", **tokens), **LLAVA)
    config = dict(text_config=text("mistral"), vision_config=clip(), image_token_index=4)
    return config | dict(image_grid_pinpoints=PINPOINTS), processor


def _llava_next_video():
    config, processor = _llava_next("llava_next_video", "LlavaNextVideo", video_token="<video>")
    video_token_id = processor.tokenizer.video_token_id
    return config | dict(text_config=text("llama"), video_token_index=video_token_id), processor


def _llava_onevision():
    tokens = tokenizer(image_token="<image>", video_token="<video>")
    images = pil("llava_onevision", "LlavaOnevision", size={"height": 28, "width": 28}, image_grid_pinpoints=PINPOINTS)
    settings = dict(num_image_tokens=4, vision_feature_select_strategy="full", chat_template=tiny.LLAVA_TEMPLATE)
    config = dict(text_config=text("qwen2"), vision_config=siglip(), image_token_index=4)
    config |= dict(video_token_index=tokens.video_token_id, image_grid_pinpoints=PINPOINTS)
    return config, make_processor("llava_onevision", "LlavaOnevision", images, tokens, **settings)


def _video_llava():
    from transformers import VideoLlavaImageProcessor

    tokens = tokenizer(image_token="<image>", video_token="<video>")
    settings = dict(patch_size=14, chat_template=tiny.LLAVA_TEMPLATE)
    processor = make_processor("video_llava", "VideoLlava", VideoLlavaImageProcessor(**SQUARE), tokens, **settings)
    config = dict(text_config=text("llama"), vision_config=clip(), image_token_index=4, image_seq_length=4)
    return config | dict(video_token_index=tokens.video_token_id), processor


def _qwen(family: str, name: str, text_config: dict, **vision_config):
    tokens = tokenizer(
        *("<|im_start|>", "<|im_end|>"),
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
    )
    images = pil("qwen2_vl", "Qwen2VL", patch_size=14, min_pixels=56 * 56, max_pixels=112 * 112)
    sizes = dict(depth=2, hidden_size=16, intermediate_size=32, num_heads=2, out_hidden_size=32, patch_size=14)
    config = dict(text_config=text(**text_config), vision_config=sizes | vision_config)
    for token in ("image", "video", "vision_start", "vision_end"):
        config[f"{token}_token_id"] = getattr(tokens, f"{token}_token_id")
    template = chatml("<|vision_start|><|image_pad|><|vision_end|>")
    return config, make_processor(family, name, images, tokens, chat_template=template)


def rope(*section: int, **kwargs) -> dict:
    return {"rope_type": "default", "mrope_section": list(section), "rope_theta": 10000.0, **kwargs}


def _qwen2_vl():
    text_config = dict(model_type="qwen2_vl_text", rope_parameters=rope(1, 1, 2))
    return _qwen("qwen2_vl", "Qwen2VL", text_config, embed_dim=16, hidden_size=32, mlp_ratio=2)


def _qwen2_5_vl():
    text_config = dict(model_type="qwen2_5_vl_text", rope_parameters=rope(1, 1, 2))
    return _qwen("qwen2_5_vl", "Qwen2_5_VL", text_config, fullatt_block_indexes=[1], window_size=56)


def _qwen3_vl():
    text_config = dict(model_type="qwen3_vl_text", head_dim=8, rope_parameters=rope(2, 1, 1, mrope_interleaved=True))
    return _qwen("qwen3_vl", "Qwen3VL", text_config, deepstack_visual_indexes=[0, 1], num_position_embeddings=16)


def _idefics():
    rows = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]
    tokens = tokenizer(
        *("<|im_start|>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *rows),
        image_token="<image>",
    )
    # 56 pixels on the longest edge, cut into tiles of 28: up to 2 x 2 tiles and the whole image
    images = pil("idefics3", "Idefics3", size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    config = dict(
        text_config=text("llama"), vision_config=vision(), image_token_id=tokens.image_token_id, scale_factor=2
    )
    return config, make_processor(
        "idefics3", "Idefics3", images, tokens, image_seq_len=1, chat_template=IDEFICS_TEMPLATE
    )


def _internvl():
    tokens = tokenizer(
        *("<|im_start|>", "<|im_end|>"),
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    images = pil("got_ocr2", "GotOcr2", **TILES)
    config = dict(
        text_config=text("qwen2"),
        vision_config=vision(image_size=[28, 28], patch_size=[14, 14]),
        image_token_id=tokens.context_image_token_id,
        image_seq_length=1,
        downsample_ratio=0.5,
    )
    settings = dict(image_seq_length=1, chat_template=chatml("<IMG_CONTEXT>\n"))
    return config, make_processor("internvl", "InternVL", images, tokens, **settings)


def _gemma3():
    tokens = tokenizer(
        *("<start_of_turn>", "<end_of_turn>"),
        image_token="<image_soft_token>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
    )
    images = pil("gemma3", "Gemma3", size={"height": 28, "width": 28})
    config = dict(
        text_config=text("gemma3_text", head_dim=8),
        vision_config=siglip(),
        image_token_index=tokens.image_token_id,
        boi_token_index=tokens.boi_token_id,
        eoi_token_index=tokens.eoi_token_id,
        mm_tokens_per_image=4,
    )
    return config, make_processor("gemma3", "Gemma3", images, tokens, image_seq_length=4, chat_template=GEMMA_TEMPLATE)


class PixtralLayout(ProcessorMixin):
    """
    `PixtralProcessor` by hand: its module cannot be imported without torchvision. A row of image tokens ends with a
    break, the last one with an end; breaks and ends count among `image_token_ids`, as in the original.
    """

    image_token, patch = "[IMG]", 28

    def __init__(self, image_processor, tokenizer, chat_template=None):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token_ids = tokenizer.convert_tokens_to_ids(["[IMG]", "[IMG_BREAK]", "[IMG_END]"])
        self.image_token_id = self.image_token_ids[0]

    def _process_images(self, images, **kwargs):
        return super()._process_images(images, **kwargs | {"patch_size": self.patch})

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        height, width = image_inputs["image_sizes"][image_idx]
        row = "[IMG]" * (int(width) // self.patch)
        return "[IMG_BREAK]".join([row] * (int(height) // self.patch)) + "[IMG_END]"


def _mistral3():
    tokens = tokenizer("[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
    images = pil("pixtral", "Pixtral", size={"longest_edge": 84}, patch_size=14)
    config = dict(
        text_config=text("mistral", head_dim=8),
        vision_config=vision("pixtral", hidden_size=32, image_size=84),
        image_token_index=tokens.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
    )
    return config, PixtralLayout(images, tokens, chat_template=MISTRAL_TEMPLATE)


def _aya_vision():
    turns = ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|START_OF_IMG|>", "<|END_OF_IMG|>")
    tokens = tokenizer(*turns, "<|IMG_PATCH|>", "TILE", "TILE_GLOBAL")
    config = dict(text_config=text("cohere2", head_dim=8), vision_config=siglip(), downsample_factor=2)
    config |= dict(image_token_index=tokens.convert_tokens_to_ids("<|IMG_PATCH|>"))
    settings = dict(patch_size=14, downsample_factor=2, img_size=28, chat_template=AYA_TEMPLATE)
    return config, make_processor("aya_vision", "AyaVision", pil("got_ocr2", "GotOcr2", **TILES), tokens, **settings)


FAMILIES = {
    "llava": _llava,
    "vipllava": _vipllava,
    "llava_next": _llava_next,
    "llava_next_video": _llava_next_video,
    "llava_onevision": _llava_onevision,
    "video_llava": _video_llava,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "idefics3": _idefics,
    # SmolVLM's processor wants `num2words` for its videos; its images are laid out as Idefics3's are
    "smolvlm": _idefics,
    "internvl": _internvl,
    "gemma3": _gemma3,
    "mistral3": _mistral3,
    "aya_vision": _aya_vision,
}


# Images of one size, in tiles, of any size, in several runs of tokens, and masks of its own: what the others do in other words.
KINDS = ("llava", "llava_next", "qwen2_5_vl", "idefics3", "gemma3")
EVERY_FAMILY = [name if name in KINDS else pytest.param(name, marks=pytest.mark.extras) for name in FAMILIES]


def build(family: str, seed: int = 0):
    """A random model of the family, in evaluation mode, and its processor."""
    config, processor = FAMILIES[family]()
    set_seed(seed)
    model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[family](**config)).eval()
    for parameter in model.parameters():
        # some projections of images start at zero, and then no image would make a difference
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model, processor
