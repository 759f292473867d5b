"""mistral.rs in process: `worker_mistral.py MODEL.gguf LORA_FOLDER THREADS ADAPTERS`. A thread a request; no HTTP."""

import concurrent.futures
import json
import os
import random
import sys
import time
from pathlib import Path

WORDS = "time day year way man thing world life hand part child eye woman place work week case point number group".split()


def write_lora(folder: Path, config: dict, seed: int) -> None:
    """A random rank-8 PEFT LoRA over all linear sites of every layer, as a checkpoint folder."""
    import numpy as np

    rng, hidden, ffn = np.random.default_rng(seed), config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    sites = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden, kv), "self_attn.v_proj": (hidden, kv), "self_attn.o_proj": (hidden, hidden)}
    sites |= {"mlp.gate_proj": (hidden, ffn), "mlp.up_proj": (hidden, ffn), "mlp.down_proj": (ffn, hidden)}
    header, blobs, at = {}, [], 0
    for layer in range(config["num_hidden_layers"]):
        for site, (inputs, outputs) in sites.items():
            bound = (3 / inputs) ** 0.5
            for part, shape, scale in (("A", (8, inputs), bound), ("B", (outputs, 8), bound / 100)):
                data = rng.uniform(-scale, scale, shape).astype(np.float32).tobytes()
                header[f"base_model.model.model.layers.{layer}.{site}.lora_{part}.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + len(data)]}
                blobs.append(data)
                at += len(data)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))
    targets = [site.split(".")[1] for site in sites]
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 8, "target_modules": targets, "bias": "none"}))


class Worker:
    def __init__(self, model: str, loras: str, config: str, threads: str, adapters: str):
        os.environ["RAYON_NUM_THREADS"] = threads
        import mistralrs

        self.api, path, count = mistralrs, Path(model), int(adapters)
        which = mistralrs.Which.GGUF(quantized_model_id=str(path.parent), quantized_filename=path.name, adapters=[], max_adapters=count, max_rank=8)
        self.runner = mistralrs.Runner(which=which, max_seqs=max(64, count), prefix_cache_n=0)
        self.aliases = []
        for i in range(count):
            folder = Path(loras) / f"peft-{i:03d}"
            if not (folder / "adapter_config.json").exists():
                write_lora(folder, json.loads(Path(config).read_text()), i)
            self.runner.load_lora_adapter(f"a{i}", str(folder))
            self.aliases.append(f"a{i}")

    def _one(self, text: str, tokens: int, adapter: str | None = None):
        request = self.api.CompletionRequest(model="default", prompt=text, max_tokens=tokens, temperature=0.0, ignore_eos=True, adapter=adapter)
        usage = self.runner.send_completion_request(request).usage
        if usage.completion_tokens != tokens:
            raise RuntimeError(f"{usage.completion_tokens} tokens came, not {tokens}")
        return usage

    def batch(self, kind: str, texts: list[str], tokens: int) -> tuple[float, dict]:
        """All at once, a thread each."""
        adapters = {"base": [None] * len(texts), "one": self.aliases[:1] * len(texts)}.get(kind) or [self.aliases[i % len(self.aliases)] for i in range(len(texts))]
        with concurrent.futures.ThreadPoolExecutor(len(texts)) as pool:
            start = time.perf_counter()
            usages = list(pool.map(lambda pair: self._one(pair[0], tokens, pair[1]), zip(texts, adapters)))
            seconds = time.perf_counter() - start
        return len(texts) * tokens / seconds, {"prompt_tokens": sum(u.prompt_tokens for u in usages) / len(usages)}

    def decode(self, batch: int, context: int, tokens: int, seed: int) -> tuple[float, dict]:
        """By its own account of the time after the first token; batches by the slowest of them."""
        texts = [self._text(context, seed * batch + i) for i in range(batch)]
        with concurrent.futures.ThreadPoolExecutor(batch) as pool:
            usages = list(pool.map(lambda text: self._one(text, tokens), texts))
        return batch * tokens / max(u.total_completion_time_sec for u in usages), {"context": usages[0].prompt_tokens}

    def prefill(self, tokens: int, seed: int) -> tuple[float, dict]:
        """One prompt of about `tokens` tokens; the rate counts what it was."""
        usage = self._one(self._text(tokens, seed), 1)
        return usage.prompt_tokens / usage.total_prompt_time_sec, {"prompt_tokens": usage.prompt_tokens}

    @staticmethod
    def _text(tokens: int, seed: int) -> str:
        return " ".join(random.Random(seed).choices(WORDS, k=tokens))


if __name__ == "__main__":
    import worker_loop

    worker_loop.serve(Worker, sys.argv[1:])
