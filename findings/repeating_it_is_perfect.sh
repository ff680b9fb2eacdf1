#!/usr/bin/env bash
# ROUGE-L of the package rouge (1.0.1), with which benchmarks of image-text models score long answers: of an answer that says the right
# words over and over it is 1, as of the right answer, and of one that says a repeated word once it is 1 too. The package counts the
# words of both sides as sets (and of each the longest common subsequence). rouge-score (0.1.2), by the definition: 0.4 each.
. "$(dirname "$0")/environment.sh" rouge==1.0.1 rouge_score==0.1.2
python - <<'P' 2> /dev/null
from rouge import Rouge
from rouge_score.rouge_scorer import RougeScorer

ONCE, FOUR_TIMES = "red circle", " ".join(["red circle"] * 4)
found = {}
for name, answer, truth in (
    ("right", ONCE, ONCE),
    ("said four times", FOUR_TIMES, ONCE),
    ("said once of four times", ONCE, FOUR_TIMES),
    ("the other way round", "circle red", ONCE),
):
    theirs = Rouge().get_scores(answer, truth)[0]["rouge-l"]["f"]
    definition = RougeScorer(["rougeL"]).score(truth, answer)["rougeL"].fmeasure
    found[name] = (round(theirs, 6), round(definition, 6))
    print(f"{name}: rouge {theirs:.3f}, rouge-score {definition:.3f}")
assert list(found.values()) == [(1, 1), (1, 0.4), (1, 0.4), (0.5, 0.5)]
P
