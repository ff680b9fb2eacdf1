#!/usr/bin/env bash
# lmms-eval (0.7.3), one model that answers every question of two benchmarks right, in sentences: "Yes." and "No, there is none.".
# Its MME reads the first letters and gives full marks. Its POPE compares the whole answer with "yes" or "no": accuracy 0, F1 0. If one
# answer in a hundred is the bare word, precision and recall are 100, because what is neither word is left out of both. After a
# fine-tuning on sentences a sound model can look lost. (EvolvingLMMs-Lab/lmms-eval#356: all zeros, of LLaVA-1.5.)
. "$(dirname "$0")/environment.sh" --no-deps lmms_eval==0.7.3 loguru==0.7.3
python - <<'P' 2> /dev/null
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

tasks = Path(find_spec("lmms_eval").submodule_search_locations[0], "tasks")


def metrics(task):
    spec = spec_from_file_location(task, tasks / task / "utils.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pope, mme = metrics("pope"), metrics("mme")
SENTENCE = {"yes": "Yes.", "no": "No, there is none."}


def measure(answers):
    """Of right answers to questions that are answered by yes and no in turn."""
    truths = ["yes", "no"] * (len(answers) // 2)
    of_pope = [pope.pope_process_results({"question_id": n, "answer": t}, [a]) for n, (t, a) in enumerate(zip(truths, answers))]
    found = {}
    for name in ("accuracy", "precision", "recall", "f1_score"):
        aggregate = getattr(pope, f"pope_aggregate_{name}")
        found[name] = 100 * aggregate([each[f"pope_{name}"] for each in of_pope])
    of_mme = [
        mme.mme_process_results({"question_id": n // 2, "answer": t.title(), "category": "existence"}, [a])["mme_perception_score"]
        for n, (t, a) in enumerate(zip(truths, answers))
    ]
    found["MME, of 200"] = mme.mme_aggregate_results(of_mme)
    print({name: round(value, 1) for name, value in found.items()})
    return found


sentences = [SENTENCE["yes"], SENTENCE["no"]] * 50
assert measure(["yes", "no"] * 50) == {"accuracy": 100, "precision": 100, "recall": 100, "f1_score": 100, "MME, of 200": 200}
assert measure(sentences) == {"accuracy": 0, "precision": 0, "recall": 0, "f1_score": 0, "MME, of 200": 200}
assert measure(["Yes", *sentences[1:]]) == {"accuracy": 1, "precision": 100, "recall": 100, "f1_score": 100, "MME, of 200": 200}
P
