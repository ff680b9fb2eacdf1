#!/usr/bin/env bash
# An image that was shrunk in place by `thumbnail`, put into a dataset and read back, is the original again: the row keeps the
# path of the file it was opened from. (`resize` gives a new image, whose pixels are stored.)
. "$(dirname "$0")/environment.sh" datasets==5.2.0 pillow==12.3.0
python - <<'P'
from datasets import Dataset, Features, Image
from PIL import Image as PIL

PIL.new("RGB", (100, 50)).save("photo.png")
shrunk = PIL.open("photo.png")
shrunk.thumbnail((20, 20))
resized = PIL.open("photo.png").resize((20, 10))
rows = Dataset.from_dict({"image": [shrunk, resized]}, features=Features({"image": Image()}))
print("in memory:", shrunk.size, resized.size, " read back:", rows[0]["image"].size, rows[1]["image"].size)
assert shrunk.size == resized.size == rows[1]["image"].size == (20, 10) and rows[0]["image"].size == (100, 50)
P
