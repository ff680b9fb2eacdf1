"""Random models of many image-text-to-text families, each with the processor of its family."""

from contextlib import contextmanager
from functools import partial
from importlib import import_module

import tiny
import torch
from tiny import tokenizer
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, ProcessorMixin, set_seed


# Chat templates as the families publish them, cut down to users and assistants with images and texts.
CHATML = (
    "{{% for message in messages %}}<|im_start|>{{{{ message['role'] }}}}\n{{% for part in message['content'] %}}"
    "{{% if part['type'] == 'image' %}}{image}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}"
    "<|im_end|>\n{{% endfor %}}{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
)
INTERNVL_TEMPLATE = CHATML.format(image="<IMG_CONTEXT>\n")
QWEN_TEMPLATE = CHATML.format(image="<|vision_start|><|image_pad|><|vision_end|>")
IDEFICS_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<start_of_image>{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST]{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}[IMG]{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ '[/INST]' if message['role'] == 'user' else eos_token }}{% endfor %}"
)
AYA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|START_OF_TURN_TOKEN|>{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|END_OF_TURN_TOKEN|>"
    "{% endfor %}"
)

PINPOINTS = [[28, 56], [56, 28], [56, 56]]


def text(model_type: str, **kwargs) -> dict:
    return (
        dict(
            model_type=model_type,
            vocab_size=416,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        | kwargs
    )


def vision(model_type: str | None = None, **kwargs) -> dict:
    tower = dict(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    return tower | ({} if model_type is None else {"model_type": model_type}) | kwargs


clip = partial(vision, "clip_vision_model", num_hidden_layers=3)
siglip = partial(vision, "siglip_vision_model", vision_use_head=False)


def pil(family: str, name: str, **kwargs):
    """The family's image processor on Pillow; the one in the public name space may want torchvision."""
    module = import_module(f"transformers.models.{family}.image_processing_pil_{family}")
    return getattr(module, f"{name}ImageProcessorPil")(**kwargs)


SQUARE = dict(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
COUNTED = dict(patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1)


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
    tokens = tokenizer(image_token="<image>")
    config = dict(text_config=text("llama"), vision_config=clip(), image_token_index=4, image_seq_length=4)
    processor = make_processor(
        "llava", "Llava", pil("clip", "CLIP", **SQUARE), tokens, chat_template=tiny.LLAVA_TEMPLATE, **COUNTED
    )
    return config, processor


def _vipllava():
    config, processor = _llava()
    return config | dict(vision_config=clip(num_hidden_layers=6), vision_feature_layers=[-2, -3]), processor


def _llava_next():
    images = pil("llava_next", "LlavaNext", image_grid_pinpoints=PINPOINTS, **SQUARE)
    processor = make_processor(
        "llava_next",
        "LlavaNext",
        images,
        tokenizer(image_token="<image>"),
        chat_template=tiny.LLAVA_TEMPLATE,
        **COUNTED,
    )
    config = dict(
        text_config=text("mistral"), vision_config=clip(), image_token_index=4, image_grid_pinpoints=PINPOINTS
    )
    return config, processor


def _llava_next_video():
    config, _ = _llava_next()
    tokens = tokenizer(image_token="<image>", video_token="<video>")
    images = pil("llava_next", "LlavaNext", image_grid_pinpoints=PINPOINTS, **SQUARE)
    processor = make_processor(
        "llava_next_video", "LlavaNextVideo", images, tokens, chat_template=tiny.LLAVA_TEMPLATE, **COUNTED
    )
    return config | dict(text_config=text("llama"), video_token_index=tokens.video_token_id), processor


def _llava_onevision():
    tokens = tokenizer(image_token="<image>", video_token="<video>")
    images = pil("llava_onevision", "LlavaOnevision", size={"height": 28, "width": 28}, image_grid_pinpoints=PINPOINTS)
    processor = make_processor(
        "llava_onevision",
        "LlavaOnevision",
        images,
        tokens,
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=tiny.LLAVA_TEMPLATE,
    )
    config = dict(
        text_config=text("qwen2"),
        vision_config=siglip(),
        image_token_index=4,
        video_token_index=tokens.video_token_id,
        image_grid_pinpoints=PINPOINTS,
    )
    return config, processor


def _video_llava():
    tokens = tokenizer(image_token="<image>", video_token="<video>")
    from transformers import VideoLlavaImageProcessor

    processor = make_processor(
        "video_llava",
        "VideoLlava",
        VideoLlavaImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokens,
        patch_size=14,
        chat_template=tiny.LLAVA_TEMPLATE,
    )
    config = dict(
        text_config=text("llama"),
        vision_config=clip(),
        image_token_index=4,
        video_token_index=tokens.video_token_id,
        image_seq_length=4,
    )
    return config, processor


def _qwen(family: str, name: str, text_config: dict, **vision_config):
    tokens = tokenizer(
        *("<|im_start|>", "<|im_end|>"),
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
    )
    images = pil("qwen2_vl", "Qwen2VL", patch_size=14, min_pixels=56 * 56, max_pixels=112 * 112)
    config = dict(
        text_config=text(**text_config),
        vision_config=dict(
            depth=2, hidden_size=16, intermediate_size=32, num_heads=2, out_hidden_size=32, patch_size=14
        )
        | vision_config,
        image_token_id=tokens.image_token_id,
        video_token_id=tokens.video_token_id,
        vision_start_token_id=tokens.vision_start_token_id,
        vision_end_token_id=tokens.vision_end_token_id,
    )
    return config, make_processor(family, name, images, tokens, chat_template=QWEN_TEMPLATE)


def _qwen2_vl():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    return _qwen(
        "qwen2_vl",
        "Qwen2VL",
        dict(model_type="qwen2_vl_text", rope_parameters=rope),
        embed_dim=16,
        hidden_size=32,
        mlp_ratio=2,
    )


def _qwen2_5_vl():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    return _qwen(
        "qwen2_5_vl",
        "Qwen2_5_VL",
        dict(model_type="qwen2_5_vl_text", rope_parameters=rope),
        fullatt_block_indexes=[1],
        window_size=56,
    )


def _qwen3_vl():
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0, "mrope_interleaved": True}
    return _qwen(
        "qwen3_vl",
        "Qwen3VL",
        dict(model_type="qwen3_vl_text", head_dim=8, rope_parameters=rope),
        deepstack_visual_indexes=[0, 1],
        num_position_embeddings=16,
    )


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
    images = pil(
        "got_ocr2", "GotOcr2", size={"height": 28, "width": 28}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    config = dict(
        text_config=text("qwen2"),
        vision_config=vision(image_size=[28, 28], patch_size=[14, 14]),
        image_token_id=tokens.context_image_token_id,
        image_seq_length=1,
        downsample_ratio=0.5,
    )
    return config, make_processor(
        "internvl", "InternVL", images, tokens, image_seq_length=1, chat_template=INTERNVL_TEMPLATE
    )


def _gemma3():
    tokens = tokenizer(
        *("<start_of_turn>", "<end_of_turn>"),
        image_token="<image_soft_token>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
    )
    images = pil(
        "gemma3",
        "Gemma3",
        size={"height": 28, "width": 28},
    )
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
    tokens = tokenizer(
        "<|START_OF_TURN_TOKEN|>",
        "<|END_OF_TURN_TOKEN|>",
        "<|START_OF_IMG|>",
        "<|END_OF_IMG|>",
        "<|IMG_PATCH|>",
        "TILE",
        "TILE_GLOBAL",
    )
    images = pil(
        "got_ocr2", "GotOcr2", size={"height": 28, "width": 28}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    config = dict(
        text_config=text("cohere2", head_dim=8),
        vision_config=siglip(),
        image_token_index=tokens.convert_tokens_to_ids("<|IMG_PATCH|>"),
        downsample_factor=2,
    )
    return config, make_processor(
        "aya_vision",
        "AyaVision",
        images,
        tokens,
        patch_size=14,
        downsample_factor=2,
        img_size=28,
        chat_template=AYA_TEMPLATE,
    )


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
