#!/usr/bin/env bash
# A new CLIP text model of transformers (5.24.0) with a tokenizer of one's own. Its texts end with a token of another number than
# 49407, so all have the same embedding, exactly, and nothing is said: the model takes the state of the first `eos_token_id` of
# its configuration, 49407 whatever the vocabulary, and in a text without one the state of the first token, before all words.
# And if `</s>` has the number 2, as in most vocabularies, saying so does not help: for old checkpoints 2 means "the highest number
# of the text". A text is then its word of the highest number, and what stands after that word has no effect.
. "$(dirname "$0")/environment.sh" torch==2.13.0 transformers==5.24.0 numpy==2.4.6
python - <<'P' 2> /dev/null
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast, set_seed

TEXTS = ["a red circle", "a blue circle", "star", "star with a red circle"]
WORDS = ["a", "with", "red", "blue", "circle", "star"]
SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "projection_dim": 16}


def distances(special, **config):
    words = {word: number for number, word in enumerate([*special, *WORDS])}
    end = words["</s>"]
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", words["<s>"]), ("</s>", end)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    set_seed(0)
    model = CLIPTextModelWithProjection(CLIPTextConfig(vocab_size=len(words), **SIZE, **config)).eval()
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        texts = model(**inputs).text_embeds
    apart = {pair: torch.dist(texts[pair[0]], texts[pair[1]]).item() for pair in ((0, 1), (0, 2), (2, 3))}
    print(f"</s> is {end}, the configuration says {model.config.eos_token_id}:", {k: round(v, 3) for k, v in apart.items()})
    return apart


default = distances(["<pad>", "<s>", "</s>"])
assert max(default.values()) == 0
two = distances(["<pad>", "<s>", "</s>"], eos_token_id=2)
assert two[0, 2] > 0.1 and two[2, 3] < 1e-5
three = distances(["<pad>", "<s>", "<unk>", "</s>"], eos_token_id=3)
assert min(three.values()) > 0.1
P
