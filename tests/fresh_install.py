"""The way of README.md from `pip install` to a trained model, in a new environment and without constraints:

    python tests/fresh_install.py DIRECTORY

installs as Install says, runs the training snippet and the one that embeds, searches and generates as they stand (on the
tiny checkpoints of the package, under the names in the snippets), removes hf_sugar, loads what was saved by its remote code
and compares the embeddings and the answer."""

import json
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path


ROOT = Path(__file__).parents[1]
TINY = {
    "llava-hf/llava-1.5-7b-hf": "llava",
    "facebook/dinov2-base": "dinov2",
    "BAAI/bge-base-en-v1.5": "bert",
    "openai/clip-vit-large-patch14": "clip",
}
WITHOUT_HF_SUGAR = """
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

assert importlib.util.find_spec("hf_sugar") is None
model = AutoModelForImageTextToText.from_pretrained("my-sugar", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("my-sugar", trust_remote_code=True)
photo = Path("photo.jpg")
expected = torch.load("expected.pt")
embeddings = model.embed(**processor.embed_inputs(["a red circle", photo, ["What is this?", photo]]))
print("largest difference of an embedding:", (embeddings - expected["embeddings"]).abs().max().item())
torch.testing.assert_close(embeddings, expected["embeddings"])
photos = sorted(Path("photos").glob("*.jpg"))
scores = model.embed(**processor.embed_inputs(["a red circle to the left of a blue square"])) @ model.embed(
    **processor.embed_inputs(photos)
).T
print("found first:", photos[scores.argmax()].name, "and by the index:", expected["first"])
assert photos[scores.argmax()].name == expected["first"]
question = [{"type": "image", "path": "photo.jpg"}, {"type": "text", "text": "What is this?"}]
settings = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
inputs = processor.apply_chat_template([{"role": "user", "content": question}], **settings)
answer = model.generate(**inputs, max_new_tokens=64)
print("answer:", processor.decode(answer[0], skip_special_tokens=True))
assert answer.tolist() == expected["answer"]
"""


def main(directory: Path):
    directory.mkdir(parents=True)
    venv.create(directory / "venv", with_pip=True)
    python = directory / "venv" / "bin" / "python"

    def run(*command, **kwargs):
        print("$", *map(str, command), flush=True)
        return subprocess.run(command, cwd=directory, check=True, **kwargs)

    readme = (ROOT / "README.md").read_text()
    run("git", "clone", "-q", ROOT.as_uri(), "hf_sugar")
    [install] = re.findall(r"^(pip install \./hf_sugar)\b", readme, re.MULTILINE)
    run(python, "-m", *install.split(), stdout=subprocess.DEVNULL)
    shutil.rmtree(directory / "hf_sugar")
    run(python, "-m", "pip", "list")

    where = "import hf_sugar; print(hf_sugar.__path__[0])"
    package = Path(run(python, "-c", where, stdout=subprocess.PIPE, text=True).stdout.strip())
    for name, folder in TINY.items():
        shutil.copytree(package / "world" / "weights" / folder, directory / name)
    records = json.loads((ROOT / "examples" / "emoji" / "llava_train.json").read_text())[:8]
    (directory / "photos").mkdir()
    convert = "import sys; from PIL import Image; Image.open(sys.argv[1]).convert('RGB').save(sys.argv[2])"
    for record in records:
        name = f"photos/{Path(record['image']).stem}.jpg"
        source = ROOT / "examples" / "emoji" / record["image"]
        subprocess.run([python, "-c", convert, source, directory / name], check=True)
        record["image"] = name
    shutil.copy(directory / records[0]["image"], directory / "photo.jpg")
    (directory / "llava.json").write_text(json.dumps(records))

    snippets = re.findall(r"^```python\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    (directory / "train.py").write_text(snippets[0])
    [use] = [snippet for snippet in snippets if "SugarIndex.build" in snippet]
    keep = "{'embeddings': embeddings, 'first': Path(hits[0][0].metadata['path']).name, 'answer': answer.tolist()}"
    (directory / "use.py").write_text(f"{use}\nimport torch\ntorch.save({keep}, 'expected.pt')\n")
    (directory / "without.py").write_text(WITHOUT_HF_SUGAR)
    run(python, "train.py")
    run(python, "use.py")
    run(python, "-m", "pip", "uninstall", "-q", "-y", "hf_sugar")
    run(python, "without.py")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
