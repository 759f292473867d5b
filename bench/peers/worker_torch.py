"""transformers + PEFT in process: `worker_torch.py CONFIG.json DTYPE THREADS ADAPTERS`.

The model has the served one's shapes and random weights: what weights are does not change what they cost, and no package
that reads GGUF is needed. Decoding is greedy by hand, which is leaner than `generate`. Mixed adapters are PEFT's
`adapter_names`, one LoRA of rank 8 over all linear sites a row.
"""

import copy
import json
import sys
import time
from pathlib import Path

import peft
import torch
import transformers
import worker_loop


class Worker:
    def __init__(self, config: str, dtype: str, threads: str, adapters: str):
        torch.set_num_threads(int(threads))
        torch.manual_seed(0)
        made = transformers.LlamaConfig(**json.loads(Path(config).read_text()))
        self.model = transformers.LlamaForCausalLM(made).to({"bf16": torch.bfloat16, "f32": torch.float32}[dtype]).eval()
        self.vocabulary = made.vocab_size
        lora = peft.LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
        self.names = [f"a{i}" for i in range(int(adapters))]
        self.lora = peft.get_peft_model(copy.deepcopy(self.model), lora, adapter_name="a0")
        for name in self.names[1:]:
            self.lora.add_adapter(name, lora)
        self.lora.to(self.model.dtype).eval()
        for kind in ("base", "one", "own"):
            self.batch(kind, ["not counted"], 2)

    def _ids(self, batch: int, length: int, seed: int) -> torch.Tensor:
        return torch.randint(1000, self.vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))

    @torch.inference_mode()
    def _generate(self, model, ids: torch.Tensor, tokens: int, **extra) -> tuple[float, float]:
        """Seconds of the prefill with the first token, and of the `tokens - 1` steps after it."""
        start = time.perf_counter()
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1, **extra)
        first = time.perf_counter()
        for _ in range(tokens - 1):
            step = out.logits[:, -1].argmax(-1, keepdim=True)
            out = model(input_ids=step, past_key_values=out.past_key_values, use_cache=True, **extra)
        return first - start, time.perf_counter() - first

    def batch(self, kind: str, texts: list[str], tokens: int) -> tuple[float, dict]:
        """Rows of 21 tokens: the texts' own ids do not matter for speed."""
        rows, extra = len(texts), {}
        if kind == "own":
            extra = {"adapter_names": [self.names[i % len(self.names)] for i in range(rows)]}
        if kind == "one":
            self.lora.set_adapter(self.names[0])
        prefill, decode = self._generate(self.model if kind == "base" else self.lora, self._ids(rows, 21, len(texts[0])), tokens, **extra)
        details = {"decode_only": rows * (tokens - 1) / decode, "distinct_adapters": min(rows, len(self.names))}
        return rows * tokens / (prefill + decode), details

    def decode(self, batch: int, context: int, tokens: int, seed: int) -> tuple[float, dict]:
        """Decode steps only."""
        _, seconds = self._generate(self.model, self._ids(batch, context, seed), tokens + 1)
        return batch * tokens / seconds, {}

    def prefill(self, tokens: int, seed: int) -> tuple[float, dict]:
        """One prompt."""
        seconds, _ = self._generate(self.model, self._ids(1, tokens, seed), 1)
        return tokens / seconds, {}


if __name__ == "__main__":
    worker_loop.serve(Worker, sys.argv[1:])
