"""Servers under test: started once, stopped by signal (SIGSTOP) while another is measured, ended with the run."""

import base64
import json
import random
import shutil
import signal
import socket
import struct
import subprocess
import time
from pathlib import Path

from . import client
from .machine import memory_mb

START_S = 300


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """A server process on 127.0.0.1. `with server:` wakes it; outside of it the process is stopped and takes no CPU."""

    name = "server"
    health = "/health"
    adapters = 0  # how many can be named in a request: 0 .. adapters
    base_apart = False  # whether another server, without adapters, measures the base

    def __init__(self, name: str, command: list, log: Path):
        self.name, self.log = name, log
        self.command = [str(part) for part in command]
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Starts it and waits until it is healthy; then puts it to sleep."""
        log = self.log.open("w")
        self.process = subprocess.Popen(self.command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + START_S
        while True:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-8:])
                raise RuntimeError(f"{self.name} did not start: {' '.join(self.command)}\n{tail}")
            try:
                if client.call(self.port, self.health)[0] == 200:
                    break
            except (OSError, EOFError):
                pass
            time.sleep(0.1)
        self.memory_at_start = memory_mb(self.pid)
        self._signal(signal.SIGSTOP)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def __enter__(self) -> "Server":
        self._signal(signal.SIGCONT)
        return self

    def __exit__(self, *_) -> None:
        self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        if self.process and self.process.poll() is None:
            self.process.send_signal(number)

    def stop(self) -> None:
        """Ends the process (and waits for it)."""
        if self.process and self.process.poll() is None:
            self._signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def completion(self, prompt: str | list[int], tokens: int, adapter: int | None = None, stream: bool = False) -> bytes:
        """A request that generates exactly `tokens` tokens greedily, under the adapter of that number or none."""
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **self.extras(adapter)}
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return client.request("/v1/completions", body)

    def extras(self, adapter: int | None) -> dict:
        """The fields that only this server has."""
        raise NotImplementedError


class LlamaServer(Server):
    """llama-server with `loras` loaded and not applied; a request names the ones it wants."""

    base_apart = True

    def __init__(self, llama, fmt: str, model: Path, loras: list[Path], slots: int, context: int, threads: int, log: Path):
        self.port = free_port()
        self.adapters = len(loras)
        command = [llama.tool("llama-server"), "-m", model, "--host", "127.0.0.1", "--port", self.port, "-t", threads, "-tb", threads]
        command += ["-np", slots, "-c", slots * context, "--no-cache-prompt", "--cache-ram", 0, "--no-ui", "-lv", 2]
        if loras:
            command += ["--lora", ",".join(map(str, loras)), "--lora-init-without-apply"]
        super().__init__(f"llama-server {fmt}", command, log)

    def extras(self, adapter: int | None) -> dict:
        # The cheapest greedy sampler it has: the default chain would sort candidates for nothing.
        extras = {"cache_prompt": False, "top_k": 1, "samplers": ["top_k"]}
        return extras if adapter is None else {**extras, "lora": [{"id": adapter, "scale": 1.0}]}


class MoteServer(Server):
    """Our server with `adapters` to be uploaded; `flags` are appended, so that variants (--rank 0, --dtype ..) are one class."""

    health = "/readyz"

    def __init__(self, name: str, binary: Path, model: Path, flags: list[str], adapters: int, threads: int, data_dir: Path, log: Path):
        self.port = free_port()
        self.adapters = adapters
        self.base_id = model.stem
        shutil.rmtree(data_dir, ignore_errors=True)
        command = [binary, "serve", "--no-auth", "--listen", f"127.0.0.1:{self.port}", "--model", model, "--model-id", self.base_id]
        command += ["--data-dir", data_dir, "--threads", threads, "--no-prefix-cache", *flags]
        super().__init__(name, command, log)

    def extras(self, adapter: int | None) -> dict:
        return {"model": self.base_id if adapter is None else adapter_name(adapter)}

    def upload_batch(self, start: int, count: int, scale: float) -> float:
        """Uploads adapters `start .. start + count` by POST /adapters/batch: seconds, the server's answer read."""
        numbers = adapter_bytes(start, count, scale)
        lines = [json.dumps({"name": adapter_name(start + i), "data": base64.b64encode(data).decode()}) for i, data in enumerate(numbers)]
        seconds = 0.0
        for at in range(0, count, 250_000):
            body = client.request("/adapters/batch", "\n".join(lines[at : at + 250_000]).encode(), "application/x-ndjson")
            took, answers = client.exchange(self.port, body)
            seconds += took
            if b'"error"' in answers or answers.count(b'"generation"') != len(lines[at : at + 250_000]):
                raise client.LoadError(f"upload of a batch: {answers[:300].decode(errors='replace')}")
        return seconds

    def upload_singly(self, start: int, count: int, scale: float) -> float:
        """Uploads adapters one request each on one connection (26 bytes of body): seconds."""
        requests = [
            client.request(f"/adapters?name={adapter_name(start + i)}&scheme=tiny13&dtype=bf16", data, "application/octet-stream")
            for i, data in enumerate(adapter_bytes(start, count, scale))
        ]
        seconds, statuses = client.in_turn(self.port, requests)
        if any(status != 201 for status in statuses):
            raise client.LoadError(f"single uploads: statuses {sorted(set(statuses))}")
        return seconds


def adapter_name(number: int) -> str:
    """The name under which adapter `number` is stored."""
    return f"bench-{number:07d}"


def adapter_bytes(seed: int, count: int, scale: float) -> list[bytes]:
    """`count` adapters of 13 random bf16 numbers: 26 bytes each, uniform within +-scale."""
    r = random.Random(seed)
    made = []
    for _ in range(count):
        floats = struct.pack("<13f", *(r.uniform(-scale, scale) for _ in range(13)))
        made.append(b"".join(floats[i + 2 : i + 4] for i in range(0, 52, 4)))  # the upper half of an f32 is a bf16
    return made
