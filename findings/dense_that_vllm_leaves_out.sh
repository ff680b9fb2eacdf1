#!/usr/bin/env bash
# vLLM builds the Dense layers of a sentence-transformers model only where modules.json has them under one of three exact
# names. sentence-transformers loads `sentence_transformers.sentence_transformer.modules.Dense`, the path that it is imported
# from, as gladly, with the same embeddings. By vLLM's source (0.33.0: `try_get_dense_modules`, then `_load_st_projector`) there
# is then no projector: it would serve the vector before the Dense layer, of another size, without a word.
. "$(dirname "$0")/environment.sh" torch==2.13.0 transformers==5.23.0 sentence-transformers==6.2.0 tokenizers==0.23.3
pip --disable-pip-version-check download -q --no-deps vllm==0.33.0 2> pip.log || { cat pip.log; exit 1; }
python - <<'P' 2> /dev/null
import ast
import glob
import json
import zipfile
from pathlib import Path

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers

words = Tokenizer(models.WordLevel({"[UNK]": 0, "red": 1, "circle": 2}, unk_token="[UNK]"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
SentenceTransformer(modules=[StaticEmbedding(words, embedding_dim=8), Dense(8, 2)], device="cpu").save("model")
before = SentenceTransformer("model", device="cpu").encode("red circle")

# vLLM's own lines, with files read from a folder
space = {"cache": lambda f: f, "get_hf_file_to_dict": lambda name, model, revision: json.loads(Path(model, name).read_text())}
with zipfile.ZipFile(glob.glob("vllm-*.whl")[0]) as wheel:
    source = ast.parse("from __future__ import annotations\n" + wheel.read("vllm/transformers_utils/config.py").decode())
keep = [source.body[0]]
for node in source.body:
    if isinstance(node, ast.Assign) and "_DENSE_MODULE_TYPES" in ast.unparse(node.targets[0]):
        keep.append(node)
    elif getattr(node, "name", "") == "try_get_dense_modules":
        keep.append(node)
exec(compile(ast.Module(keep, []), "config.py", "exec"), space)

found = {}
for name in ("as saved", "sentence_transformers.sentence_transformer.modules.Dense"):
    modules = json.loads(Path("model/modules.json").read_text())
    if name != "as saved":
        modules[1]["type"] = name
        Path("model/modules.json").write_text(json.dumps(modules))
    embedding = SentenceTransformer("model", device="cpu").encode("red circle")
    found[name] = space["try_get_dense_modules"]("model")
    print(f"{modules[1]['type']}: sentence-transformers gives {embedding.shape[0]} numbers, "
          f"vLLM finds {len(found[name] or [])} Dense layers")
    assert (embedding == before).all() and embedding.shape == (2,)
assert len(found["as saved"]) == 1 and found[name] is None
P
