#!/usr/bin/env bash
# POPE's yes ratio says how often a model says yes: 100 is one that agrees with everything, which is what the benchmark is made to
# show. `pope_yes_ratio` of lmms-eval (0.7.3) counts the right answers in its place: 50 for a model that always says yes, 50 for one
# that always says no.
. "$(dirname "$0")/environment.sh" --no-deps lmms_eval==0.7.3
python - <<'P' 2> /dev/null
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

file = Path(find_spec("lmms_eval").submodule_search_locations[0], "tasks", "pope", "utils.py")
spec = spec_from_file_location("pope", file)
pope = module_from_spec(spec)
spec.loader.exec_module(pope)
found = {}
for answer in ("yes", "no"):
    questions = [{"question_id": n, "answer": truth} for n, truth in enumerate(["yes", "no"] * 10)]
    results = [pope.pope_process_results(question, [answer]) for question in questions]
    for name in ("accuracy", "yes_ratio"):
        found[answer, name] = 100 * getattr(pope, f"pope_aggregate_{name}")([each[f"pope_{name}"] for each in results])
    print(f"always {answer}: accuracy {found[answer, 'accuracy']:.0f}, yes ratio {found[answer, 'yes_ratio']:.0f}")
assert set(found.values()) == {50}
P
