"""Command line benchmarks, ours and llama.cpp's, as cases: one process a measurement, no HTTP in between."""

import json
import subprocess
from pathlib import Path

from .install import LlamaCpp
from .rounds import Case


def _run(command: list) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed: {(done.stderr or done.stdout)[-400:]}")
    return done.stdout


def llama_bench(llama: LlamaCpp, fmt: str, model: Path, threads: int) -> list[Case]:
    """llama-bench: one prompt of 512 tokens, and decoding 128 tokens at batch 1; one repetition a round, after its warm-up."""

    def case(key: str, prompt: int, generate: int) -> Case:
        def run(_: int) -> tuple[float, dict]:
            out = _run([llama.tool("llama-bench"), "-m", model, "-t", threads, "-p", prompt, "-n", generate, "-r", 1, "-o", "json"])
            return json.loads(out)[0]["avg_ts"], {}

        return Case(f"{key}/llama.cpp {fmt}/tool", run)

    return [case("pp512", 512, 0), case("decode1", 0, 128)]


def llama_batched(llama: LlamaCpp, fmt: str, model: Path, threads: int, clients: int = 32, context: int = 512, tokens: int = 32) -> Case:
    """llama-batched-bench: decoding `clients` sequences that begin at `context` tokens each (prompts not shared)."""

    def run(_: int) -> tuple[float, dict]:
        command = [llama.tool("llama-batched-bench"), "-m", model, "-t", threads, "-c", clients * (context + tokens)]
        command += ["-npp", context, "-ntg", tokens, "-npl", clients, "--output-format", "jsonl"]
        line = next(line for line in _run(command).splitlines() if line.startswith("{"))
        figures = json.loads(line)
        return figures["speed_tg"], {"prefill": figures["speed_pp"]}

    return Case(f"context{context}/llama.cpp {fmt}/tool", run)


def mote_bench(binary: Path, model: Path, name: str, flags: list[str], threads: int, out: Path) -> list[Case]:
    """`mote bench decode|prefill`: the forward pass alone, what llama-bench measures."""

    def case(key: str, command: str, *arguments: object) -> Case:
        def run(_: int) -> tuple[float, dict]:
            report = out / "mote-bench.json"
            _run([binary, "bench", command, "--model", model, "--threads", threads, "--rounds", 1, *arguments, *flags, "--json", report])
            (figures,) = json.loads(report.read_text())["results"]
            return figures["tokens_per_second"]["median"], {}

        return Case(f"{key}/{name}/tool", run)

    return [
        case("decode1", "decode", "--batch", 1, "--context", 64, "--steps", 128),
        case("pp512", "prefill", "--tokens", 512),
        case("context512", "decode", "--batch", 32, "--context", 512, "--steps", 32),
    ]


def has_mote_bench(binary: Path) -> bool:
    """Whether this build of ours has `mote bench`."""
    return subprocess.run([binary, "bench", "--help"], capture_output=True).returncode == 0
