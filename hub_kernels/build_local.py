"""
Builds the kernels of this folder for this machine: a stand-in for kernel-builder, which needs Nix.

    python hub_kernels/build_local.py            # what the machine can: CPU with g++, Triton (nothing to compile)
    python hub_kernels/build_local.py cpu        # one backend: cpu, cuda, triton

Writes `<kernel>/build/<variant>/` in the layout that `kernels.get_local_kernel` loads, with the digests that are
verified before loading. Builds are for this checkout only: what is published is built by kernel-builder.
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
from pathlib import Path

import tomllib
import torch
from kernels._rust import Digest, DigestAlgorithm


ROOT = Path(__file__).resolve().parent
# The variant name promises torch >= 2.11; the library is compiled against nothing newer.
TARGET = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x03090000"]
CUDA_ARCHS = {"8.0": "80", "9.0": "90", "10.0": "100", "12.0": "120"}

OPS = """\
import torch

from . import {name}


ops = torch.ops.{name}


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{name}::{{op_name}}"
"""


def tree_hash(folder: Path, backend: str) -> str:
    """Covers every source, because Python keeps the first library it loads under a name."""
    digest = hashlib.sha256(f"{torch.__version__} {backend}".encode())
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and parts[0] not in ("build", "tests", "benchmarks") and "__pycache__" not in parts:
            digest.update("/".join(parts).encode() + b"\0" + path.read_bytes())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()[:7]


def run(command: list[str]):
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise SystemExit(f"{' '.join(command)}\nfailed with exit code {finished.returncode}:\n{finished.stderr}")


def compile_cpu(folder: Path, config: dict, name: str, output: Path):
    include = Path(torch.__file__).parent / "include"
    flags = [
        *("-O3", "-fPIC", "-std=c++20", "-fno-gnu-unique", "-fvisibility=hidden", "-DCPU_KERNEL"),
        *(
            f"-DTORCH_EXTENSION_NAME={name}",
            *TARGET,
            f"-ffile-prefix-map={folder}=.",
            f"-ffile-prefix-map={include}=torch",
            f"-I{include}",
            f"-I{sysconfig.get_paths()['include']}",
        ),
        *config["kernel"]["gak_cpu"]["cxx-flags"],
    ]
    sources = [*config["torch"]["src"], *config["kernel"]["gak_cpu"]["src"]]
    sources = [folder / source for source in sources if source.endswith(".cpp")]
    with tempfile.TemporaryDirectory() as scratch:
        objects = []
        for source in sources:
            objects.append(str(Path(scratch) / f"{source.stem}.o"))
            run([os.environ.get("CXX", "g++"), *flags, "-c", str(source), "-o", objects[-1]])
        link = ["-shared", "-Wl,--as-needed", f"-L{include.parent / 'lib'}", "-ltorch_cpu", "-lc10"]
        run([os.environ.get("CXX", "g++"), *objects, *link, "-o", str(output)])


def compile_cuda(folder: Path, config: dict, name: str, output: Path):
    include = Path(torch.__file__).parent / "include"
    flags = [
        *("-O3", "-std=c++20", "-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden,-fno-gnu-unique", "-DCUDA_KERNEL"),
        *("-DUSE_CUDA", f"-DTORCH_EXTENSION_NAME={name}", *TARGET),
        *(f"-I{include}", f"-I{sysconfig.get_paths()['include']}"),
    ]
    for capability in config["kernel"]["gak_cuda"]["cuda-capabilities"]:
        arch = CUDA_ARCHS[capability]
        flags.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
    sources = [*config["torch"]["src"], *config["kernel"]["gak_cuda"]["src"]]
    sources = [str(folder / source) for source in sources if source.endswith((".cpp", ".cu"))]
    link = [f"-L{include.parent / 'lib'}", "-ltorch_cpu", "-lc10"]
    run(["nvcc", *flags, *sources, *link, "-o", str(output)])


def cuda_version() -> str:
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return text.split("release ")[1].split(",")[0].replace(".", "")


def build(kernel: str, backend: str, output: Path = ROOT) -> Path:
    folder = ROOT / kernel
    config = tomllib.loads((folder / "build.toml").read_text())
    general = config["general"]
    package = general["name"].replace("-", "_")
    name = f"_{package}_{backend}_{tree_hash(folder, backend)}"
    compiled = "torch" in config
    if compiled:
        system = f"{os.uname().machine}-{sys.platform}"
        variant = f"torch-stable-abi211-{'cpu' if backend == 'cpu' else 'cu' + cuda_version()}-{system}"
    else:
        variant = f"torch-{backend}"
    target = output / kernel / "build" / variant
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{variant}-"))
    shutil.copytree(
        folder / "torch-ext" / package, scratch, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
    )
    if compiled:
        library = scratch / f"{name}.abi3.so"
        (compile_cpu if backend == "cpu" else compile_cuda)(folder, config, name, library)
        (scratch / "_ops.py").write_text(OPS.format(name=name))
    metadata = {
        "name": general["name"],
        "id": name,
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
    }
    if backend == "cuda":
        capabilities = (
            config["kernel"]["gak_cuda"]["cuda-capabilities"]
            if compiled
            else config["torch-noarch"]["cuda_capabilities"]
        )
        metadata["backend"]["archs"] = capabilities
    metadata["digest"] = {"algorithm": "sha256", "files": Digest.hash_variant(DigestAlgorithm.SHA256, scratch).files}
    (scratch / "metadata.json").write_text(json.dumps(metadata, indent=2))
    scratch.chmod(0o755)
    # Two renames: a folder cannot be replaced in one.
    if target.exists():
        old = Path(tempfile.mkdtemp(dir=target.parent, prefix=".old-"))
        os.replace(target, old / variant)
        os.replace(scratch, target)
        shutil.rmtree(old)
    else:
        os.replace(scratch, target)
    return target


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backends", nargs="*", help="cpu, cuda, triton; default: all this machine can")
    parser.add_argument("--output", type=Path, default=ROOT, help="where to write; default: beside the sources")
    arguments = parser.parse_args()
    wanted = arguments.backends
    if not {*wanted} <= {"cpu", "cuda", "triton"}:
        parser.error(f"backends are cpu, cuda and triton, got {' '.join(wanted)}")
    if not wanted:
        wanted = ["triton"]
        wanted += ["cpu"] if shutil.which(os.environ.get("CXX", "g++")) else []
        wanted += ["cuda"] if shutil.which("nvcc") and torch.cuda.is_available() else []
        if "cpu" not in wanted:
            sys.stdout.write("gak: no C++ compiler found (install g++ or set CXX); the PyTorch path is used instead\n")
    for backend in wanted:
        kernels = [("gak-triton", "cpu"), ("gak-triton", "cuda")] if backend == "triton" else [("gak", backend)]
        for kernel, variant in kernels:
            sys.stdout.write(f"built {build(kernel, variant, arguments.output)}\n")


if __name__ == "__main__":
    main()
