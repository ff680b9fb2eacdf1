#!/usr/bin/env bash
# Chat rows in two JSON files, the contents of the first strings and of the second lists of parts: read in this order, every
# content of the second becomes JSON source text (an answer `a` becomes `"a"` with its quotes); in the other order none does.
. "$(dirname "$0")/environment.sh" datasets==5.2.0
python - <<'P'
import json
from datasets import load_dataset

def rows(question, answer):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}) + "\n"

open("strings.jsonl", "w").write(rows("when?", "now"))
open("parts.jsonl", "w").write(rows([{"type": "text", "text": "q"}], "a"))
answers = {}
for files in (["strings.jsonl", "parts.jsonl"], ["parts.jsonl", "strings.jsonl"]):
    for row in load_dataset("json", data_files=files, split="train", cache_dir=f"cache{files[0]}"):
        answers.setdefault(files[0], []).append(row["messages"][1]["content"])
print(answers)
assert answers == {"strings.jsonl": ["now", '"a"'], "parts.jsonl": ["a", "now"]}
P
