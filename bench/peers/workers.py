"""Peers without a server of their own here: a process with the model loaded, asked over stdin and stdout.

They run in process, without HTTP, in one static batch: that flatters them, and the tables say so by their names.
"""

import json
import signal
import subprocess
from pathlib import Path

from . import loads, prompts
from .machine import memory_mb
from .rounds import Case


class Worker:
    """One such process. It is stopped (SIGSTOP) between measurements. `batched`: whether it takes more than one row."""

    base_apart = False

    def __init__(self, name: str, python: Path, arguments: list, adapters: int, batched: bool, logs: Path):
        self.name, self.adapters, self.batched = name, adapters, batched
        script = Path(__file__).with_name(f"worker_{arguments[0]}.py")
        self.command = [str(part) for part in (python, script, *arguments[1:], adapters)]
        self.log = logs / f"{name.replace(' ', '-')}.log"
        self.process: subprocess.Popen | None = None

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Starts it and waits until the model and its adapters are loaded."""
        log = self.log.open("w")
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        self._answer()
        self.memory_at_start = memory_mb(self.process.pid)
        self.process.send_signal(signal.SIGSTOP)

    def stop(self) -> dict | None:
        """Ends it; its peak memory."""
        if not self.alive:
            return None
        self.process.send_signal(signal.SIGCONT)
        memory = memory_mb(self.process.pid)
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        return {"at_start_mb": self.memory_at_start["resident_mb"], "peak_mb": memory["peak_mb"]}

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-4:])
            raise RuntimeError(f"{self.name} ended: {tail}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return answer

    def _case(self, key: str, ask) -> Case:
        def run(number: int) -> tuple[float, dict]:
            self.process.send_signal(signal.SIGCONT)
            try:
                self.process.stdin.write(json.dumps(ask(number)) + "\n")
                self.process.stdin.flush()
                answer = self._answer()
            finally:
                if self.alive:
                    self.process.send_signal(signal.SIGSTOP)
            return answer["rate"], answer.get("details", {})

        return Case(key, run, [self.process.pid])

    def served(self, clients: int, kind: str) -> Case:
        """The tokens of the served load as one batch."""
        group = f"served{clients}"

        def ask(number: int) -> dict:
            texts = prompts.short(loads.seed(group, number), clients)
            return {"do": "batch", "kind": kind, "texts": texts, "tokens": loads.TOKENS}

        return self._case(f"{group}/{self.name}/{kind}", ask)

    def forward(self) -> list[Case]:
        """Batch-1 decode, prefill of 512 tokens, and 32 sequences decoding at context 512."""
        single = [
            self._case(f"decode1/{self.name}/tool", lambda number: {"do": "decode", "batch": 1, "context": 64, "tokens": 128, "seed": number}),
            self._case(f"pp512/{self.name}/tool", lambda number: {"do": "prefill", "tokens": 512, "seed": number}),
        ]
        batch = self._case(f"context512/{self.name}/tool", lambda number: {"do": "decode", "batch": 32, "context": 512, "tokens": 32, "seed": number})
        return [*single, batch] if self.batched else single
