"""A small HTTP/1.1 load client on raw asyncio streams: it shares the cores with the server, so it does little.

Closed loop: each of n clients holds one connection and sends its next request when the last was answered. Bodies are
serialised before the clock starts.
"""

import asyncio
import json
import time
from dataclasses import dataclass, field

TIMEOUT_S = 900


class LoadError(Exception):
    """A server answered something that makes the measurement void."""


@dataclass
class Answer:
    """One request (its bytes), in seconds since the load began; `events` are the times of the streamed pieces of text, `pieces` those pieces."""

    sent: float
    data: bytes = b""
    done: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    events: list[float] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)


@dataclass
class Load:
    """What a load gave: `wall` seconds from the first request sent to the last answered."""

    wall: float
    answers: list[Answer]

    @property
    def rate(self) -> float:
        """Completion tokens a second over the whole load, prefill included."""
        return sum(a.completion_tokens for a in self.answers) / self.wall

    @property
    def prompt_tokens(self) -> float:
        """Mean prompt tokens of a request, as the server counted them."""
        return sum(a.prompt_tokens for a in self.answers) / len(self.answers)


def request(path: str, body: dict | bytes | None, content_type: str = "application/json", method: str | None = None, key: str | None = None) -> bytes:
    """The bytes of one request, with a bearer key or none."""
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body, separators=(",", ":")).encode()
    method = method or ("GET" if body is None else "POST")
    head = f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: {content_type}\r\ncontent-length: {len(data)}\r\n"
    head += f"authorization: Bearer {key}\r\n\r\n" if key else "\r\n"
    return head.encode() + data


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[bytes, bytes]]:
    lines = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
    headers = {}
    for line in lines[1:]:
        name, _, value = line.partition(b":")
        headers[name.lower()] = value.strip()
    return int(lines[0].split(b" ", 2)[1]), headers


async def _chunks(reader: asyncio.StreamReader, headers: dict[bytes, bytes]):
    """The body in the pieces it came in."""
    if headers.get(b"transfer-encoding", b"").lower() != b"chunked":
        yield await reader.readexactly(int(headers.get(b"content-length", b"0")))
        return
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]
    await reader.readuntil(b"\r\n")


async def _send(reader, writer, data: bytes) -> tuple[int, bytes]:
    writer.write(data)
    await writer.drain()
    status, headers = await _head(reader)
    return status, b"".join([piece async for piece in _chunks(reader, headers)])


def _usage(answer: Answer, usage: dict | None) -> None:
    if usage:
        answer.prompt_tokens, answer.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]


async def _whole(reader, writer, data: bytes, answer: Answer, start: float) -> None:
    status, body = await _send(reader, writer, data)
    answer.done = time.perf_counter() - start
    if status != 200:
        raise LoadError(f"status {status}: {body[:400].decode(errors='replace')}")
    _usage(answer, json.loads(body).get("usage"))


async def _streamed(reader, writer, data: bytes, answer: Answer, start: float) -> None:
    writer.write(data)
    await writer.drain()
    status, headers = await _head(reader)
    rest = b""
    async for piece in _chunks(reader, headers):
        now = time.perf_counter() - start
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise LoadError(f"error in the stream: {event['error']}")
                if event.get("choices") and (text := event["choices"][0].get("text")):
                    answer.events.append(now)
                    answer.pieces.append(text)
                _usage(answer, event.get("usage"))
    answer.done = time.perf_counter() - start
    if status != 200:
        raise LoadError(f"status {status}: {rest[:400].decode(errors='replace')}")


async def _run(port: int, work: list[list[bytes]], stream: bool) -> Load:
    pairs = [await asyncio.open_connection("127.0.0.1", port, limit=1 << 22) for _ in work]
    one = _streamed if stream else _whole
    answers: list[Answer] = []
    start = time.perf_counter()

    async def client(pair, requests: list[bytes]) -> None:
        for data in requests:
            answer = Answer(time.perf_counter() - start, data)
            await one(*pair, data, answer, start)
            answers.append(answer)

    try:
        async with asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as group:
            for pair, requests in zip(pairs, work):
                group.create_task(client(pair, requests))
    except* LoadError as errors:
        raise errors.exceptions[0] from None
    finally:
        for _, writer in pairs:
            writer.close()
    return Load(max(a.done for a in answers), answers)


def load(port: int, work: list[list[bytes]], stream: bool = False, expect: int | None = None) -> Load:
    """Runs `work`, a list of requests for each client, all clients at once. `expect`: completion tokens each must have."""
    result = asyncio.run(_run(port, work, stream))
    wrong = [a.completion_tokens for a in result.answers if expect is not None and a.completion_tokens != expect]
    if wrong:
        raise LoadError(f"{len(wrong)} of {len(result.answers)} answers have other than {expect} tokens, e.g. {wrong[0]}")
    return result


def call(port: int, path: str, body: dict | bytes | None = None, content_type: str = "application/json", method: str | None = None, key: str | None = None) -> tuple[int, bytes]:
    """One request on its own connection: (status, body)."""

    async def once():
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
        try:
            return await asyncio.wait_for(_send(reader, writer, request(path, body, content_type, method, key)), TIMEOUT_S)
        finally:
            writer.close()

    return asyncio.run(once())


async def closed_loop(port: int, next_request, stream: bool, goes_on, start: float) -> list[Answer]:
    """One client on one connection that sends what `next_request()` gives, one after another, while `goes_on(answers so far)`."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    one = _streamed if stream else _whole
    answers: list[Answer] = []
    try:
        while goes_on(answers):
            answer = Answer(time.perf_counter() - start)
            await one(reader, writer, next_request(), answer, start)
            answers.append(answer)
    finally:
        writer.close()
    return answers


def exchange(port: int, data: bytes) -> tuple[float, bytes]:
    """Sends one large request while its answer is read as it comes: (seconds, body). Raises unless it is a 200."""

    async def run():
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
        start = time.perf_counter()
        writer.write(data)
        sending = asyncio.create_task(writer.drain())
        status, headers = await _head(reader)
        body = b"".join([piece async for piece in _chunks(reader, headers)])
        seconds = time.perf_counter() - start
        await sending
        writer.close()
        if status != 200:
            raise LoadError(f"status {status}: {body[:400].decode(errors='replace')}")
        return seconds, body

    return asyncio.run(run())


def in_turn(port: int, requests: list[bytes]) -> tuple[float, list[int]]:
    """Sends requests one after another on one connection: (seconds, statuses)."""

    async def run():
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
        start = time.perf_counter()
        statuses = [(await _send(reader, writer, data))[0] for data in requests]
        seconds = time.perf_counter() - start
        writer.close()
        return seconds, statuses

    return asyncio.run(run())
