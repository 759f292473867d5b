"""mistral.rs in process: `worker_mistral.py MODEL.gguf THREADS ADAPTERS`. One request at a time.

Its Python runner refuses a second request while one runs ("Already borrowed"), and version 0.9.5 refuses LoRA on a GGUF of
the llama family ("its Q/K tensors use converter-permuted adjacent RoPE order"): so batch 1 and prefill of the base are all.
"""

import os
import random
import sys
from pathlib import Path

WORDS = "time day year way man thing world life hand part child eye woman place work week case point number group".split()


class Worker:
    def __init__(self, model: str, threads: str, _adapters: str):
        os.environ["RAYON_NUM_THREADS"] = threads
        import mistralrs

        self.api, path = mistralrs, Path(model)
        which = mistralrs.Which.GGUF(quantized_model_id=str(path.parent), quantized_filename=path.name)
        self.runner = mistralrs.Runner(which=which, prefix_cache_n=0)
        self._one(8, 0, 4)  # not counted

    def _one(self, prompt_tokens: int, seed: int, tokens: int):
        text = " ".join(random.Random(seed).choices(WORDS, k=prompt_tokens))  # each word is about a token
        request = self.api.CompletionRequest(model="default", prompt=text, max_tokens=tokens, temperature=0.0, ignore_eos=True)
        usage = self.runner.send_completion_request(request).usage
        if usage.completion_tokens != tokens:
            raise RuntimeError(f"{usage.completion_tokens} tokens came, not {tokens}")
        return usage

    def decode(self, batch: int, context: int, tokens: int, seed: int) -> tuple[float, dict]:
        """By its own account of the time after the prompt."""
        if batch != 1:
            raise ValueError("one request at a time")
        usage = self._one(context, seed, tokens)
        return tokens / usage.total_completion_time_sec, {"context": usage.prompt_tokens}

    def prefill(self, tokens: int, seed: int) -> tuple[float, dict]:
        """One prompt of about `tokens` tokens, by its own account; the rate counts what it was."""
        usage = self._one(tokens, seed, 1)
        return usage.prompt_tokens / usage.total_prompt_time_sec, {"prompt_tokens": usage.prompt_tokens}


if __name__ == "__main__":
    import worker_loop

    worker_loop.serve(Worker, sys.argv[1:])
