#!/usr/bin/env bash
# A WebDataset tar of 8 images with captions, of which the first six are .jpg and the last two .png: it loads without a word,
# and the last two rows have a caption and no image. The columns are those of the first five samples.
. "$(dirname "$0")/environment.sh" datasets==5.2.0 pillow==12.3.0
python - <<'P'
import io
import tarfile
from datasets import load_dataset
from PIL import Image

with tarfile.open("shard.tar", "w") as tar:
    for i in range(8):
        image = io.BytesIO()
        name = "jpg" if i < 6 else "png"
        Image.new("RGB", (8, 8)).save(image, "JPEG" if name == "jpg" else "PNG")
        for extension, content in ((name, image.getvalue()), ("txt", b"a caption")):
            info = tarfile.TarInfo(f"{i}.{extension}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
rows = load_dataset("webdataset", data_files=["shard.tar"], split="train", cache_dir="cache")
print(rows.column_names, [row["jpg"] is not None for row in rows], rows[7]["txt"])
assert "png" not in rows.column_names and [row["jpg"] is not None for row in rows] == [True] * 6 + [False] * 2
P
