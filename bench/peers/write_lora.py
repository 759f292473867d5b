"""Writes random LoRA adapters as GGUF. Runs in the venv (needs `gguf` and numpy).

Rank 8 with alpha 8 over q, k, v, o, gate, up and down of every layer. A is uniform with the standard deviation of PEFT's
initialisation, B a hundredth of that (PEFT's is zero): the product moves the output a little and keeps it sane. What the
numbers are does not change what they cost.
"""

import argparse

import gguf
import numpy as np

RANK = 8
SITES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument("--base", required=True)
    args.add_argument("--dtype", choices=("f16", "f32"), required=True)
    args.add_argument("paths", nargs="+")
    args = args.parse_args()
    base = gguf.GGUFReader(args.base)
    arch = base.fields["general.architecture"].contents()
    shapes = {t.name: (int(t.shape[0]), int(t.shape[1])) for t in base.tensors if any(f".{site}.weight" in t.name for site in SITES)}
    dtype = np.float16 if args.dtype == "f16" else np.float32
    for seed, path in enumerate(args.paths):
        random = np.random.default_rng(seed)
        writer = gguf.GGUFWriter(path, arch)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(RANK))
        for name, (inputs, outputs) in shapes.items():
            bound = (3 / inputs) ** 0.5
            writer.add_tensor(f"{name}.lora_a", random.uniform(-bound, bound, (RANK, inputs)).astype(dtype))
            writer.add_tensor(f"{name}.lora_b", random.uniform(-bound / 100, bound / 100, (outputs, RANK)).astype(dtype))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


if __name__ == "__main__":
    main()
