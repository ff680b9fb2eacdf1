#!/usr/bin/env bash
# sentence-transformers (6.2.0), a model that ends with Normalize, so that its vectors have length 1 and a dot product is their
# cosine. `truncate_dim` cuts after that last module: the short vectors have lengths of their own, a dot product (`similarity` of a
# model set to it, an inner-product index) ranks by these lengths too: here one text in six is the nearest to itself, of 200.
# `encode(normalize_embeddings=True)`, which looks like a repetition of what the model does, normalises after the cut.
. "$(dirname "$0")/environment.sh" torch==2.13.0 transformers==5.24.0 sentence-transformers==6.2.0 numpy==2.4.6
python - <<'P' 2> /dev/null
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers

torch.manual_seed(0)
N, DIM, SHORT = 200, 64, 4
texts = [f"word{n}" for n in range(N)]
tokenizer = Tokenizer(models.WordLevel({text: n for n, text in enumerate(texts)}, unk_token="word0"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
model = SentenceTransformer(
    modules=[StaticEmbedding(tokenizer, embedding_weights=torch.randn(N, DIM).numpy()), Normalize()],
    truncate_dim=SHORT, similarity_fn_name="dot", device="cpu",
)
found = {}
for name, settings in {"all": {"truncate_dim": DIM}, "cut": {}, "cut, normalised": {"normalize_embeddings": True}}.items():
    vectors = model.encode(texts, convert_to_tensor=True, show_progress_bar=False, **settings)
    first = model.similarity(vectors, vectors).argmax(dim=1) == torch.arange(N)  # each text is the nearest to itself
    lengths = vectors.norm(dim=1)
    found[name] = (round(lengths.min().item(), 2), round(lengths.max().item(), 2), 100 * first.float().mean().item())
    print(f"{name}: lengths {found[name][0]} to {found[name][1]}, itself first: {found[name][2]:.1f} %")
assert found["all"] == found["cut, normalised"] == (1, 1, 100)
assert found["cut"][1] < 0.6 and found["cut"][2] < 50
P
