"""The files the peers read: the model in other formats, and LoRA adapters for llama.cpp."""

import json
import os
import subprocess
from pathlib import Path

from .install import LlamaCpp, say


def requantise(llama: LlamaCpp, model: Path, formats: list[str], out: Path) -> dict[str, Path]:
    """`model` as Q4_0, Q8_0, BF16, F32 .. GGUF files under `out`, made by llama-quantize; made once for a model."""
    out.mkdir(parents=True, exist_ok=True)
    made = {}
    for fmt in formats:
        path = out / f"{model.stem}.to-{fmt}.gguf"
        if not path.exists():
            say(f"requantising to {fmt}")
            part = path.with_suffix(".part")
            command = [llama.tool("llama-quantize"), "--allow-requantize", str(model), str(part), fmt, str(os.cpu_count())]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"llama-quantize to {fmt} failed: {(done.stdout + done.stderr)[-600:]}")
            part.rename(path)
        made[fmt] = path
    return made


def lora_adapters(python: Path, model: Path, count: int, dtype: str, out: Path) -> list[Path]:
    """`count` random rank-8 LoRA adapters over all linear sites of every layer, as GGUF files."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{model.stem}.{dtype}.{i:03d}.gguf" for i in range(count)]
    if not all(path.exists() for path in paths):
        say(f"writing {count} LoRA adapters")
        script = Path(__file__).with_name("write_lora.py")
        subprocess.run([python, script, "--base", model, "--dtype", dtype, *map(str, paths)], check=True)
    return paths


def shape(python: Path, model: Path, out: Path) -> Path:
    """The model's shape in Hugging Face's terms, as a JSON file."""
    code = """if True:
        import gguf, json, sys
        reader = gguf.GGUFReader(sys.argv[1])
        arch = reader.fields["general.architecture"].contents()
        read = lambda name: reader.fields[f"{arch}.{name}"].contents()
        vocabulary = next(int(t.shape[1]) for t in reader.tensors if t.name == "token_embd.weight")
        print(json.dumps({
            "hidden_size": read("embedding_length"), "intermediate_size": read("feed_forward_length"), "num_hidden_layers": read("block_count"),
            "num_attention_heads": read("attention.head_count"), "num_key_value_heads": read("attention.head_count_kv"), "vocab_size": vocabulary,
            "tie_word_embeddings": not any(t.name == "output.weight" for t in reader.tensors), "max_position_embeddings": read("context_length"),
        }))
    """
    done = subprocess.run([python, "-c", code, model], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the shape of {model}: {done.stderr[-300:]}")
    out.write_text(json.dumps(json.loads(done.stdout), indent=1))
    return out
