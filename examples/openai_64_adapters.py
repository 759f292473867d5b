#!/usr/bin/env python3
"""64 users, 64 adapters of 26 bytes, 64 concurrent streams, one batch: with the official OpenAI client.

    pip install openai
    cargo run -- serve --no-auth            # in another terminal
    python examples/openai_64_adapters.py

MOTE_URL (default http://127.0.0.1:8080) and MOTE_API_KEY say where the server is and who calls.
"""

import asyncio
import json
import os
import random
import re
import struct
import sys
import time
import urllib.request

from openai import AsyncOpenAI

URL = os.environ.get("MOTE_URL", "http://127.0.0.1:8080")
KEY = os.environ.get("MOTE_API_KEY", "no-key-needed")
USERS = 64
TOKENS = 32


def call(method: str, path: str, body: bytes | None = None, content_type: str = "application/json") -> bytes:
    request = urllib.request.Request(
        URL + path, data=body, method=method, headers={"authorization": f"Bearer {KEY}", "content-type": content_type}
    )
    with urllib.request.urlopen(request) as response:
        return response.read()


def random_adapter(rng: random.Random, numbers: int) -> list[float]:
    """Numbers that bf16 holds exactly: the low 16 bits of the f32 are zero."""
    values = [rng.gauss(0.0, 0.3) for _ in range(numbers)]
    return [struct.unpack("<f", struct.pack("<I", struct.unpack("<I", struct.pack("<f", v))[0] & 0xFFFF0000))[0] for v in values]


def upload(count: int) -> list[str]:
    """One request uploads all adapters; the answer is a line an adapter."""
    schemes = json.loads(call("GET", "/adapters/schemes"))
    numbers = next(s["numbers"] for s in schemes["schemes"] if s["name"] == "tiny13")
    rng = random.Random(0)
    names = [f"user-{i:02}" for i in range(count)]
    lines = [
        json.dumps({"name": name, "numbers": random_adapter(rng, numbers), "dtype": "bf16", "on_conflict": "new_generation"})
        for name in names
    ]
    answers = call("POST", "/adapters/batch", "\n".join(lines).encode(), "application/x-ndjson").decode().splitlines()
    for answer in map(json.loads, answers):
        if "error" in answer:
            sys.exit(f"upload of {answer.get('name')} failed: {answer['error']}")
    return names


async def stream(client: AsyncOpenAI, model: str) -> str:
    """One user's completion, read as it is made."""
    text = ""
    chunks = await client.completions.create(
        model=model, prompt="Once upon a time", max_tokens=TOKENS, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    async for chunk in chunks:
        text += "".join(choice.text for choice in chunk.choices)
    return text


def widest_step() -> tuple[int, int]:
    """The most sequences and the most adapters that one engine step has held, from /metrics."""
    metrics = call("GET", "/metrics").decode()

    def read(name: str) -> int:
        match = re.search(rf"^{name} ([0-9.e+]+)$", metrics, re.MULTILINE)
        return int(float(match.group(1))) if match else 0

    return read("mote_engine_peak_sequences"), read("mote_engine_peak_adapters")


async def main() -> None:
    names = upload(USERS)
    async with AsyncOpenAI(base_url=URL + "/v1", api_key=KEY) as client:
        await stream(client, names[0])  # the first request of a connection pays for the connection

        started = time.perf_counter()
        alone = [await stream(client, name) for name in names]
        in_turn = time.perf_counter() - started

        started = time.perf_counter()
        together = await asyncio.gather(*(stream(client, name) for name in names))
        at_once = time.perf_counter() - started

    for name, text in list(zip(names, together))[:8]:
        print(f"{name}: {text!r}")
    print(f"... and {USERS - 8} more; {len(set(together))} different texts")
    print(f"in turn {in_turn:.1f} s, together {at_once:.1f} s: {in_turn / at_once:.1f} times as fast")
    print("every text equals the one its adapter gave alone:", list(together) == alone)
    sequences, adapters = widest_step()
    print(f"widest engine step: {sequences} sequences under {adapters} adapters")
    if list(together) != alone or adapters < USERS:
        sys.exit("not what it should be")


if __name__ == "__main__":
    asyncio.run(main())
