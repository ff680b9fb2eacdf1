"""
Builds the CPU kernel of this folder for this machine: a stand-in for kernel-builder, which needs Nix.

    python hub_kernels/build_local.py

Writes `gak/build/<variant>/` in the layout that `kernels.get_local_kernel` loads, with the digests that are verified before
loading. Builds are for this checkout only: what is published is built by kernel-builder. (The Triton kernel has nothing
to build.)
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from pathlib import Path

import torch
from kernels._rust import Digest, DigestAlgorithm


SOURCES = Path(__file__).resolve().parent / "gak"
# The variant name promises torch >= 2.11; the library is compiled against nothing newer.
TARGET = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x03090000"]

OPS = """\
import torch

from . import {name}


ops = torch.ops.{name}


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{name}::{{op_name}}"
"""


def library_name() -> str:
    """Covers every source, because Python keeps the first library it loads under a name."""
    digest = hashlib.sha256(torch.__version__.encode() + Path(__file__).read_bytes())
    for path in sorted([SOURCES / "build.toml", *SOURCES.rglob("*.cpp"), *SOURCES.glob("torch-ext/**/*.py")]):
        if "build" not in path.relative_to(SOURCES).parts:
            digest.update(path.read_bytes())
    return f"_gak_cpu_{digest.hexdigest()[:7]}"


def compile_library(config: dict, name: str, output: Path):
    include = Path(torch.__file__).parent / "include"
    sources = [SOURCES / source for source in (*config["torch"]["src"], *config["kernel"]["gak_cpu"]["src"])]
    command = [
        *(os.environ.get("CXX", "g++"), "-shared", "-fPIC", "-std=c++20", "-fvisibility=hidden"),
        *(*config["kernel"]["gak_cpu"]["cxx-flags"], f"-DTORCH_EXTENSION_NAME={name}", *TARGET),
        *(f"-I{include}", f"-I{sysconfig.get_paths()['include']}", *map(str, sources)),
        *(f"-L{include.parent / 'lib'}", "-ltorch_cpu", "-lc10", "-o", str(output)),
    ]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise SystemExit(f"{' '.join(command)}\nfailed with exit code {finished.returncode}:\n{finished.stderr}")


def build(output: Path = SOURCES) -> Path:
    """Builds into `output/build/<variant>`, which is replaced whole."""
    config = tomllib.loads((SOURCES / "build.toml").read_text())
    name, general = library_name(), config["general"]
    target = output / "build" / f"torch-stable-abi211-cpu-{os.uname().machine}-{sys.platform}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as folder:
        scratch = Path(folder) / "new"
        shutil.copytree(SOURCES / "torch-ext" / "gak", scratch, ignore=shutil.ignore_patterns("__pycache__"))
        compile_library(config, name, scratch / f"{name}.abi3.so")
        (scratch / "_ops.py").write_text(OPS.format(name=name))
        metadata = {
            **{"name": general["name"], "id": name, "version": general["version"], "license": general["license"]},
            **{"python-depends": [], "backend": {"type": "cpu"}},
            "digest": {"algorithm": "sha256", "files": Digest.hash_variant(DigestAlgorithm.SHA256, scratch).files},
        }
        (scratch / "metadata.json").write_text(json.dumps(metadata, indent=2))
        # Two renames: a folder cannot be replaced in one.
        if target.exists():
            os.replace(target, Path(folder) / "old")
        os.replace(scratch, target)
    return target


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    if shutil.which(os.environ.get("CXX", "g++")):
        sys.stdout.write(f"built {build()}\n")
    else:
        sys.stdout.write("gak: no C++ compiler found (install g++ or set CXX); the PyTorch path is used instead\n")


if __name__ == "__main__":
    main()
