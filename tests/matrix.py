"""Runs the tests of `make test` on the lowest, the pinned and the newest versions that pyproject.toml allows, each set in
an environment of its own, and prints a table: `make test-matrix`, or `make test-matrix SETS=newest`."""

import argparse
import re
import subprocess
import sys
import time
import tomllib
import venv
from pathlib import Path


ROOT = Path(__file__).parents[1]
EXTRAS = ("test", "qlora", "kernels", "serve")
SHOWN = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "huggingface_hub", "kernels")
VERSIONS = f"from importlib.metadata import version; print(*(version(name) for name in {SHOWN}))"


def lower_bounds() -> str:
    """Constraints that take every direct dependency at its lower bound."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [requirement for name in EXTRAS for requirement in project["optional-dependencies"][name]]
    return "".join(re.sub(r"^([\w-]+)>=([\w.]+).*", r"\1==\2\n", line) for line in project["dependencies"] + extras)


def run(name: str, directory: Path, tests: list[str]) -> dict[str, str]:
    """Install a set, run the tests, and give a row of the table."""
    environment = directory / name
    python = environment / "bin" / "python"
    if not python.exists():
        venv.create(environment, with_pip=True)
    # without constraints: what pip takes today, also where an older version is there from an earlier run
    options = ["--upgrade", "--upgrade-strategy", "eager"]
    if name == "lowest":
        (directory / "lowest.txt").write_text(lower_bounds())
        options = ["-c", directory / "lowest.txt"]
    elif name == "pinned":
        options = ["-c", "constraints.txt"]
    install = [python, "-m", "pip", "--disable-pip-version-check", "install", *options, "-e", f".[{','.join(EXTRAS)}]"]
    pytest = [python, "-m", "pytest", "-m", "not extras", "-n", "2", "--dist", "loadfile", *tests]
    log = directory / f"{name}.log"
    start = time.monotonic()
    with log.open("w") as file:
        for command in install, pytest:
            print(f"{name}: {' '.join(map(str, command))} > {log}", flush=True)
            code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode
            if code and command is install:
                return {"set": name, "failed": "not installed", "log": str(log)}
    versions = subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True, check=True).stdout.split()
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for count, word in re.findall(r"(\d+) (passed|failed|skipped|error)", log.read_text().splitlines()[-1]):
        counts["failed" if word == "error" else word] += int(count)
    found = {word: str(count) for word, count in counts.items()}
    if code and not counts["failed"]:
        found["failed"] = f"pytest ended with {code}"
    return {"set": name, **dict(zip(SHOWN, versions)), **found, "seconds": f"{time.monotonic() - start:.0f}"}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sets", nargs="*", default=["lowest", "pinned", "newest"], help="All three if none is named.")
    parser.add_argument("--directory", type=Path, default=ROOT / ".matrix", help="Environments and logs.")
    parser.add_argument("--tests", nargs="+", default=[], help="Files of tests; all if none is named.")
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)
    rows = [run(name, args.directory.resolve(), args.tests) for name in args.sets]
    columns = ["set", *SHOWN, "passed", "failed", "skipped", "seconds"]
    for cells in (columns, ["---"] * len(columns), *([row.get(column, "") for column in columns] for row in rows)):
        print(f"| {' | '.join(cells)} |")
    sys.exit(any(row["failed"] != "0" for row in rows))


if __name__ == "__main__":
    main()
