"""The quality of llama.cpp's formats on held-out text: KL to its own f32, top-1 agreement, perplexity.

Windows of 256 tokens, not overlapping, 32 of them; every position after a window's first is scored. The ids are written to a
file, so that `mote bench quality --ids FILE` scores the same ones: the definitions there are these.
"""

import json
import subprocess
from pathlib import Path

from .install import LlamaCpp, Missing, say

WINDOW, COUNT = 256, 32


def _compile(llama: LlamaCpp, work: Path) -> Path:
    """The scorer, linked against the llama.cpp that was built here."""
    if llama.source is None:
        raise Missing("quality needs llama.cpp's headers: leave --llama-bin out and let it be built")
    source, program = Path(__file__).with_name("quality.cpp"), work / "quality"
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        say("compiling the scorer")
        include = ["-I", llama.source / "include", "-I", llama.source / "ggml/include"]
        link = [f"-L{llama.bin}", f"-Wl,-rpath,{llama.bin}", "-lllama", "-lggml", "-lggml-base"]
        command = ["g++", "-O2", "-std=c++17", source, *include, *link, "-o", program]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode != 0:
            raise Missing(f"the scorer does not compile: {done.stderr[-600:]}")
    return program


def _text(given: Path | None, gsm8k: Path | None, work: Path) -> Path:
    """The held-out text: as given, or questions and answers joined, in `work` (never in the repository)."""
    if given:
        return given
    if gsm8k is None:
        raise Missing("quality needs --text or --text-from-gsm8k")
    items = [json.loads(line) for line in gsm8k.read_text().splitlines()]
    path = work / "heldout.txt"
    path.write_text("\n\n".join(f"{item['question']}\n{item['answer']}" for item in items))
    return path


def llama(llama: LlamaCpp, models: dict[str, Path], names: list[str], text: Path | None, gsm8k: Path | None, ids: Path | None, work: Path) -> dict:
    """Scores each format of `names` against F32; writes the windows to `ids`."""
    program, ids = _compile(llama, work), ids or work / "quality-ids.json"
    command = [program, "tokenize", models["F32"], _text(text, gsm8k, work), WINDOW, COUNT]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode != 0:
        raise Missing(f"tokenising: {done.stderr[-300:]}")
    ids.write_text(done.stdout)
    windows = json.loads(done.stdout)["windows"]
    plain = "\n".join([str(len(windows)), *(f"{len(window)} {' '.join(map(str, window))}" for window in windows)])
    found = {}
    for name in names:
        say(f"quality of {name}")
        command = [program, "score", 1, models["F32"], models[name]]  # one thread: no barrier to wait at on a shared machine
        done = subprocess.run(list(map(str, command)), input=plain, capture_output=True, text=True)
        if done.returncode != 0:
            raise Missing(f"scoring {name}: {done.stderr[-300:]}")
        found[name] = json.loads(done.stdout)
    definition = f"{COUNT} windows of {WINDOW} tokens from an empty cache, no overlap, no BOS; logits at 0..{WINDOW - 2} scored; KL(F32 || format) in nats"
    result = {"server": llama.version, "reference": "F32 made from the same file, f32 KV", "definition": definition, "ids": str(ids), "formats": found}
    ids.with_name("quality-llama.json").write_text(json.dumps(result, indent=1) + "\n")
    return result
