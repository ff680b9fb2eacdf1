"""
Cut the example's files out of a folder with the drawings of two vendors and their names: `google.json`, `twitter.json`
(lists of records with `id`, `image`, `name`, `category`, `subcategory`, `order`) and the images that they name.

    python examples/emoji/make_cut.py --source path/to/emoji --output examples/emoji

One quarter of the concepts, as Twitter draws them, is the test split; all else is the train split. With --validation
another quarter takes the place of the test split, which is left out: that is what settings are tuned on.
"""

import argparse
import json
import random
import shutil
from collections import Counter
from itertools import groupby
from pathlib import Path

from PIL import Image


QUESTION = "<image>\nWhat does this drawing show?"
VENDORS = ("google", "twitter")


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def documents(records: list[dict], rng: random.Random) -> list[dict]:
    """Multimodal C4 documents: two to four drawings of a subcategory and a vendor, each before its name."""
    out = []
    ordered = sorted(records, key=lambda r: (r["vendor"], r["subcategory"], r["order"]))
    for (_, subcategory), group in groupby(ordered, key=lambda r: (r["vendor"], r["subcategory"])):
        rest = list(group)
        rng.shuffle(rest)
        while len(rest) > 1:
            size = min(rng.choice((2, 3, 4)), len(rest))
            shown, rest = rest[:size], rest[size:]
            infos = [{"image_name": r["file"], "matched_text_index": n} for n, r in enumerate(shown, 1)]
            texts = [f"Drawings of the kind {subcategory}.", *(r["name"] for r in shown)]
            out.append({"text_list": texts, "image_info": infos})
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder with google.json and twitter.json")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to; its images/ is replaced")
    parser.add_argument("--size", type=int, default=48, help="width and height of the images")
    parser.add_argument("--colors", type=int, default=32, help="colours of an image")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validation", action="store_true", help="another quarter in place of the test split")
    args = parser.parse_args()

    records = []
    for vendor in VENDORS:
        for record in json.loads((args.source / f"{vendor}.json").read_text(encoding="utf-8")):
            records.append({**record, "vendor": vendor, "file": f"images/{vendor[0]}{record['order']:04}.png"})
    # an ambiguous name is no caption, and a drawing that stands for two concepts has two names
    names = Counter((record["vendor"], record["name"]) for record in records)
    content = {record["file"]: (args.source / record["image"]).read_bytes() for record in records}
    copies = Counter(content.values())
    unclear = {r["id"] for r in records if names[r["vendor"], r["name"]] > 1 or copies[content[r["file"]]] > 1}
    records = [record for record in records if record["id"] not in unclear]

    rng = random.Random(args.seed)
    concepts = sorted({record["id"] for record in records})
    rng.shuffle(concepts)
    quarter = len(concepts) // 4
    test = set(concepts[quarter : 2 * quarter] if args.validation else concepts[:quarter])
    left_out = set(concepts[:quarter]) - test
    splits = {"train": [], "test": []}
    for record in sorted(records, key=lambda r: (r["vendor"], r["order"])):
        if record["vendor"] == "google" or record["id"] not in test | left_out:
            splits["train"].append(record)
        elif record["id"] in test:
            splits["test"].append(record)

    shutil.rmtree(args.output / "images", ignore_errors=True)
    (args.output / "images").mkdir(parents=True)
    rng.shuffle(splits["test"])  # pictures of a report show the first
    for split, kept in splits.items():
        for record in kept:
            image = Image.open(args.source / record["image"]).convert("RGB")
            image = image.resize((args.size, args.size), Image.Resampling.LANCZOS)
            image.quantize(args.colors, dither=Image.Dither.NONE).save(args.output / record["file"], optimize=True)
        llava = []
        for record in kept:
            turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": record["name"]}]
            llava.append({"image": record["file"], "conversations": turns})
        text = "[\n" + ",\n".join(map(json.dumps, llava)) + "\n]\n"
        (args.output / f"llava_{split}.json").write_text(text, encoding="utf-8")
        captions = [{"image": record["file"], "caption": record["name"]} for record in kept]
        write_lines(args.output / f"captions_{split}.jsonl", captions)
        pages = documents(kept, rng)
        write_lines(args.output / f"mmc4_{split}.jsonl", pages)
        print(f"{split}: {len(kept)} drawings, {len(pages)} documents")
    size = sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file())
    print(f"{size:,} bytes in {args.output}; {len(unclear)} concepts left out, whose name or drawing is not their own")


if __name__ == "__main__":
    main()
