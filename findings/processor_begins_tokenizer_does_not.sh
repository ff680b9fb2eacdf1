#!/usr/bin/env bash
# One chat template, one tokenizer that begins with <s>: `processor.apply_chat_template(..., tokenize=True)` gives that token,
# `tokenizer.apply_chat_template` and a server that renders the template (vLLM 0.33: `add_special_tokens` of a chat is false) do
# not. LLaVA-1.5's template has no {{ bos_token }}, so a model that was trained with the one is asked with the other.
. "$(dirname "$0")/environment.sh" transformers==5.24.0 tokenizers==0.23.3 pillow==12.3.0 numpy==2.4.6 jinja2==3.1.6
python - <<'P' 2> /dev/null
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "USER": 2, "hello": 3, "<image>": 4, ":": 5}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])  # as Llama's
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=words, bos_token="<s>", unk_token="<unk>", extra_special_tokens={"image_token": "<image>"}
)
template = "{% for m in messages %}{{ m['role'].upper() }}: {{ m['content'][0]['text'] }}{% endfor %}"
processor = LlavaProcessor(CLIPImageProcessorPil(), tokenizer, patch_size=14, chat_template=template)
messages = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
ids = {
    "processor": processor.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"][0],
    "tokenizer": tokenizer.apply_chat_template(messages, chat_template=template, tokenize=True, return_dict=True)["input_ids"],
}
print(ids)
assert ids["processor"] == [1, *ids["tokenizer"]] and ids["tokenizer"] == [2, 5, 3]
P
