"""Cut a smaller set out of a clip-art set of the same layout: a random sample of whole documents and of drawings that
stand in no document, every split shortened in proportion. Image files are copied as they are; drawings whose file
occurs more than once are left out, with their documents.

    python make_cut.py --source path/to/full/set --output . --max-bytes 2985000 --seed 0
"""

import argparse
import hashlib
import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path


SPLITS = ("train", "val", "test")


def find_copies(source: Path) -> set[str]:
    """Images whose file occurs more than once: across splits they would leak, and their titles contradict each other."""
    digest_of = {
        f"images/{path.name}": hashlib.sha256(path.read_bytes()).digest() for path in (source / "images").iterdir()
    }
    count = Counter(digest_of.values())
    return {name for name, digest in digest_of.items() if count[digest] > 1}


def cut_split(source: Path, split: str, share: float, seed: int, copies: set[str]) -> tuple[list[dict], list[dict]]:
    """Records and documents of one split that together, with their images, take at most `share` of the bytes of those
    without copies."""
    records = json.loads((source / f"llava_{split}.json").read_text(encoding="utf-8"))
    lines = (source / f"mmc4_{split}.jsonl").read_text(encoding="utf-8").splitlines()
    record_of = {record["image"]: record for record in records}
    units = [
        (document, [info["image_name"] for info in document["image_info"]]) for document in map(json.loads, lines)
    ]
    in_documents = {name for _, names in units for name in names}
    units += [(None, [name]) for name in record_of if name not in in_documents]
    units = [unit for unit in units if copies.isdisjoint(unit[1])]

    def size(unit) -> int:
        document, names = unit
        files = sum((source / name).stat().st_size for name in names)
        texts = [record_of[name] for name in names] + ([document] if document else [])
        return files + sum(len(dumps(text).encode()) + 2 for text in texts)

    budget = share * sum(map(size, units))
    order = list(range(len(units)))
    random.Random(seed).shuffle(order)
    kept = set()
    for index in order:
        if size(units[index]) <= budget:
            budget -= size(units[index])
            kept.add(index)
    names = {name for index in kept for name in units[index][1]}
    documents = [units[index][0] for index in sorted(kept) if units[index][0]]
    return [record for record in records if record["image"] in names], documents


def dumps(value: dict) -> str:
    return json.dumps(value, ensure_ascii=False)


def total_bytes(source: Path, cuts: dict) -> int:
    records = [record for split_records, _ in cuts.values() for record in split_records]
    texts = records + [document for _, documents in cuts.values() for document in documents]
    images = sum((source / record["image"]).stat().st_size for record in records)
    return images + sum(len(dumps(text).encode()) + 2 for text in texts) + 4 * len(SPLITS)


def write_text(path: Path, text: str):
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--source", type=Path, required=True, help="folder with images/, llava_*.json, mmc4_*.jsonl")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to; its images/ is replaced")
    parser.add_argument("--max-bytes", type=int, default=2_985_000, help="limit for images and texts together")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample")
    args = parser.parse_args()
    if args.source.resolve() == args.output.resolve():
        parser.error("--output is --source, whose images would be replaced: name another folder")

    copies = find_copies(args.source)
    whole = {split: cut_split(args.source, split, 1.0, args.seed, copies) for split in SPLITS}
    share = min(1.0, args.max_bytes / total_bytes(args.source, whole))
    cuts = {split: cut_split(args.source, split, share, args.seed, copies) for split in SPLITS}

    args.output.mkdir(parents=True, exist_ok=True)
    images, temporary = args.output / "images", args.output / "images.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for records, _ in cuts.values():
        for record in records:
            shutil.copyfile(args.source / record["image"], temporary / Path(record["image"]).name)
    shutil.rmtree(images, ignore_errors=True)
    os.replace(temporary, images)
    for split, (records, documents) in cuts.items():
        write_text(args.output / f"llava_{split}.json", "[\n" + ",\n".join(map(dumps, records)) + "\n]\n")
        write_text(args.output / f"mmc4_{split}.jsonl", "".join(dumps(document) + "\n" for document in documents))
        print(
            f"{split}: {len(records)} of {len(whole[split][0])} drawings, "
            f"{len(documents)} of {len(whole[split][1])} documents"
        )
    print(f"{total_bytes(args.source, cuts):,} bytes; {len(copies)} drawings occur more than once")


if __name__ == "__main__":
    main()
