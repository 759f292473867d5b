"""Everything at once against one server, for as long as one likes, and a verdict.

    python3 tests/python/soak.py --mote target/release/mote --minutes 60 --clients 200

Clients of several tenants complete, chat, stream (to the end and half-way), carry adapters inside requests, upload (one and many), replace, compare
and swap, roll back, delete, list, export, train (to the end and cancelled) and send what must be refused. Each waits for its answer before it asks
again, so the load is what the machine carries. The server has no reload but a restart: it is stopped with SIGTERM under load and started again on the
same directory, once early in the warm-up and once after the measured time, so that figures of growth are of one process.

A run fails when

- an answer is 5xx, other than 503 `overloaded`, or 503 `draining` while the server was told to stop, with `retry-after`; a status is not the one that
  the request must have; a connection breaks outside a restart, or an answer that has begun breaks at all; nothing comes for two minutes;
- a body is not well formed, an error lacks one of its four keys, or a stream has no proper beginning or end;
- an answer is of another adapter or generation than one that its name had while the request ran;
- the same generation, prompt and parameters give another text: greedy, and sampled with a seed; alone or among others, before and after a restart;
- something grows: the median of the measured time's last fifth is above that of its first fifth by more than `ALLOWED` says. The first 15 % of the run
  are warm-up and not measured. What clients make is bounded: they delete what they made, and take at most a few jobs at once;
- after the load, when nothing is asked, not every KV block is free or cached, or something runs, waits or is connected, or an engine request is
  unaccounted for, or a tenant's adapters are not those that were acknowledged;
- the server ends with another status than 0, or logs an error or a panic.

Times are those that a client sees in one Python process beside the server: they are for comparing kinds, not for measuring Mote.
"""

import argparse
import asyncio
import base64
import collections
import contextlib
import json
import math
import os
import pathlib
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import kill9
from kill9 import ROOT, bf16

ADMIN_KEY = "admin-key-of-the-soak-test"
TENANTS = ("ann", "ben", "cid")
NAMES = 8  # adapters of a tenant that all its clients write and read
NUMBERS = 24  # of 26 bytes each, which those adapters have in turn
JOBS = 2  # under way at once by a tenant
PATIENCE = 120.0  # seconds for an answer
WARM_UP = 0.15
BUSY = object()  # what an action answers when others are at it
TEXTS = 100_000  # remembered for comparison
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"
PROMPTS = ["Once", "The fox", "Once upon a time there was", "A", "The quick brown fox jumps over", *(
    "It was a dark and stormy night; the rain fell in torrents, " + end for end in ("and so", "but", "except", "when it was"))]
# What may be added to the first fifth's median: a part of it, and so much besides.
ALLOWED = {
    "resident MiB": (0.05, 16), "threads": (0.10, 8), "descriptors": (0.10, 16), "connections": (0.10, 8),
    "KV blocks used": (0.25, 32), "metric lines": (0.02, 40),
}


class Wrong(Exception):
    """A rule is broken."""


class Outage(Exception):
    """The server was stopped meanwhile; what was asked may be done or not."""


class Shed(Exception):
    """The server said that it cannot do this now."""


def expect(true, words):
    if not true:
        raise Wrong(str(words)[:600])


class Server(kill9.Server):
    def __init__(self, args, folder):
        self.log = open(os.path.join(folder, "log"), "a+", encoding="utf-8")
        self.started_at = self.log.tell()
        flags = ["--listen", "127.0.0.1:0", "--model", args.model, "--model-id", "base", "--data-dir", os.path.join(folder, "data"),
                 "--auth-failures-per-minute", "0", "--train-jobs", "2"]
        if args.tiny:
            # So small that it is full, and evicts, from the warm-up on: a cache that fills is no growth.
            flags += ["--dtype", "f32", "--device", "cpu", "--kv-cache-mb", "8", "--basis-dir", os.path.join(folder, "basis")]
        self.process = subprocess.Popen([args.mote, "serve", *flags], stdout=subprocess.DEVNULL, stderr=self.log,
                                        env={**os.environ, "MOTE_ADMIN_KEY": ADMIN_KEY})

    def text(self):
        self.log.seek(self.started_at)
        return self.log.read()

    def stop(self):
        """SIGTERM; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=PATIENCE)


class Answer:
    """The head of an answer, and its body as it comes."""

    def __init__(self, wire, status, headers):
        self.wire, self.status, self.headers = wire, status, headers
        self.ended = False

    async def pieces(self):
        reader, headers = self.wire.reader, self.headers
        if headers.get("transfer-encoding") == "chunked":
            while size := int(await reader.readuntil(b"\r\n"), 16):
                yield (await reader.readexactly(size + 2))[:-2]
            await reader.readexactly(2)
        elif length := int(headers.get("content-length", 0)):
            yield await reader.readexactly(length)
        self.ended = True

    async def read(self):
        return b"".join([piece async for piece in self.pieces()])

    async def events(self):
        """The data of server-sent events."""
        rest = b""
        async for piece in self.pieces():
            *events, rest = (rest + piece).split(b"\n\n")
            for event in events:
                for line in event.split(b"\n"):
                    if line.startswith(b"data:"):
                        yield line[5:].strip().decode()
        expect(not rest, f"a stream ends inside an event: {rest!r}")


class Wire:
    """HTTP/1.1 over one connection that is kept, as much of it as the server speaks."""

    def __init__(self):
        self.reader = self.writer = None

    async def send(self, port, method, path, body, headers):
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
        lines = [f"{method} {path} HTTP/1.1", "host: 127.0.0.1", f"content-length: {len(body)}", *(f"{k}: {v}" for k, v in headers.items())]
        self.writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        await self.writer.drain()
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        pairs = (line.split(":", 1) for line in head[1:] if line)
        return Answer(self, int(head[0].split()[1]), {name.lower(): value.strip() for name, value in pairs})

    def close(self):
        if self.writer is not None:
            self.writer.close()
        self.reader = self.writer = None


class Name:
    """An adapter that many write and read. One writes at a time; readers learn what it may have been while they waited."""

    def __init__(self, name):
        self.name, self.lock = name, asyncio.Lock()
        self.may = {None}  # generations; None: there is none
        self.readers = []

    @property
    def current(self):
        (generation,) = self.may
        return generation

    def writing(self, *generations):
        self.may |= set(generations)
        for seen in self.readers:
            seen |= self.may

    def settled(self, generation):
        self.may = {generation}

    @contextlib.contextmanager
    def watched(self):
        seen = set(self.may)
        self.readers.append(seen)
        try:
            yield seen
        finally:
            self.readers = [other for other in self.readers if other is not seen]


class World:
    """What all clients share: the server, what it has acknowledged, and what went wrong."""

    def __init__(self, args, folder, seed):
        self.args, self.folder, self.rng = args, folder, random.Random(seed)
        self.server, self.port, self.epoch = None, 0, 0
        self.up, self.stop = asyncio.Event(), asyncio.Event()
        self.keys = {}
        self.names = {tenant: [Name(f"{tenant}-{i}") for i in range(NAMES)] for tenant in TENANTS}
        self.jobs = {tenant: asyncio.Semaphore(JOBS) for tenant in TENANTS}
        self.numbers = [bf16(self.rng) for _ in range(NUMBERS)]
        self.generations = {}  # numbers -> generation
        self.texts = {}
        self.compared = 0
        self.chats = True
        self.counts = collections.defaultdict(collections.Counter)  # kind -> status -> requests
        self.times = collections.defaultdict(collections.Counter)  # kind -> logarithm of seconds -> requests
        self.violations, self.violated = [], 0

    def wrong(self, words):
        self.violated += 1
        if len(self.violations) < 100:
            self.violations.append(words)
        if self.violated <= 5:
            print("WRONG:", words, flush=True)

    def count(self, kind, status, seconds):
        self.counts[kind][status] += 1
        self.times[kind][round(math.log(max(seconds, 1e-6), 1.02))] += 1

    def same(self, text, *key):
        """The text that this key had before."""
        if len(self.texts) > TEXTS:
            self.texts.clear()
        known = self.texts.setdefault(key, text)
        self.compared += known is not text
        expect(known == text, f"another text: {text!r}, before {known!r}, of {key}")

    async def start(self):
        self.server = await asyncio.to_thread(Server, self.args, self.folder)
        self.port = await asyncio.to_thread(self.server.address)
        wire = Wire()
        while True:
            answer = await wire.send(self.port, "GET", "/readyz", b"", {})
            await answer.read()
            if answer.status == 200:
                break
            await asyncio.sleep(0.05)
        wire.close()
        self.up.set()

    async def end(self):
        """Stops the server as an operator does."""
        self.epoch += 1
        self.up.clear()
        started = time.monotonic()
        try:
            status = await asyncio.to_thread(self.server.stop)
        except subprocess.TimeoutExpired:
            raise Wrong(f"the server runs {PATIENCE:.0f} s after SIGTERM") from None
        if status != 0:
            self.wrong(f"the server ended with {status}")
        bad = [line for line in self.server.text().splitlines() if " ERROR " in line or "panicked" in line]
        if bad:
            self.wrong(f"the server logged {len(bad)} errors, first {bad[0]}")
        self.server.log.close()
        return time.monotonic() - started


class Client:
    """One of many: asks, waits for the answer, checks it."""

    def __init__(self, world, number, tenant):
        self.world, self.tenant = world, tenant
        self.rng = random.Random(f"{world.args.seed} {number}")
        self.prefix = f"c{number}-"
        self.wire, self.epoch, self.turn = Wire(), 0, 0

    @contextlib.asynccontextmanager
    async def ask(self, kind, method, path, body=None, *, key=None, form="application/json", breaks=False, **headers):
        """A request, counted. `breaks`: its answer may end early when the server stops."""
        world = self.world
        await world.up.wait()
        if self.epoch != world.epoch:
            self.epoch = world.epoch
            self.wire.close()
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        headers["authorization"] = f"Bearer {key or world.keys.get(self.tenant, ADMIN_KEY)}"
        if body is not None:
            headers["content-type"] = form
        started, status, answer = time.monotonic(), "broken", None
        what = f"{kind}: {method} {path} {data[:300]!r}"
        try:
            async with asyncio.timeout(PATIENCE):
                answer = await self.wire.send(world.port, method, path, data, headers)
                status = str(answer.status)
                if answer.status >= 500:
                    code = fault(await answer.read())["code"]
                    status = f"{status} {code}"
                    known = code == "overloaded" or (code == "draining" and self.epoch != world.epoch)
                    expect(answer.status == 503 and known and "retry-after" in answer.headers, status)
                    raise Shed
                yield answer
        except (OSError, EOFError, TimeoutError, asyncio.LimitOverrunError) as error:
            self.wire.close()
            if self.epoch == world.epoch or (answer is not None and not breaks):
                raise Wrong(f"{what}: {error!r} after {status}, {time.monotonic() - started:.1f} s") from error
            status = "restart"
            raise Outage from error
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise Wrong(f"{what}: {error!r}") from error
        except Wrong as error:
            raise Wrong(f"{what}: {error}") from error
        finally:
            if answer is None or not answer.ended or answer.headers.get("connection") == "close":
                self.wire.close()
            world.count(kind, status, time.monotonic() - started)

    async def call(self, kind, method, path, body=None, want=(200,), **how):
        """A whole answer of JSON: status, value, headers."""
        async with self.ask(kind, method, path, body, **how) as answer:
            text = await answer.read()
            expect(answer.status in want, f"{answer.status}, {text[:300]!r}")
            value = json.loads(text) if text else None
            if answer.status >= 400:
                fault(text)
            return answer.status, value, answer.headers

    async def refused(self, kind, status, code, method, path, body=None, **how):
        _, value, _ = await self.call(kind, method, path, body, (status,), **how)
        expect(value["error"]["code"] == code, f"{method} {path}: {value}")

    async def run(self):
        kinds, weights = zip(*((action, weight) for action, weight in ACTIONS if action.__name__ in self.world.args.only), strict=True)
        while not self.world.stop.is_set():
            self.turn += 1
            (action,) = self.rng.choices(kinds, weights)
            try:
                if await action(self) is BUSY:
                    await asyncio.sleep(0.05)
            except (Outage, Shed, Wrong) as error:
                await self.after(error)
        self.wire.close()

    async def after(self, error):
        """What a client does when something did not go: it deletes what it may have left."""
        for _ in range(20):
            if isinstance(error, Wrong):
                self.world.wrong(str(error))
            if isinstance(error, Shed):
                await asyncio.sleep(self.rng.uniform(0.5, 2))
            try:
                return await self.tidy()
            except (Outage, Shed, Wrong) as again:
                error = again

    async def tidy(self):
        _, page, _ = await self.call("list", "GET", "/adapters/train?limit=100")
        for job in page["data"]:
            if job["name"].startswith(self.prefix) and job["status"] in kill9.ACTIVE:
                await self.call("train", "POST", f"/adapters/train/{job['id']}/cancel", b"", (200, 409))
        _, page, _ = await self.call("list", "GET", f"/adapters?limit=1000&prefix={self.prefix}")
        for adapter in page["data"]:
            await self.delete(adapter["name"], (204, 404))

    async def delete(self, name, want=(204,)):
        await self.call("delete", "DELETE", f"/adapters/{name}", want=want)


def fault(text):
    """An error's envelope."""
    error = json.loads(text)["error"]
    expect(set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"], f"an error is {text[:300]!r}")
    return error


def b64(data):
    return base64.b64encode(data).decode()


# Completions


def inline(client, data):
    """An adapter inside the request."""
    if client.rng.random() < 0.5:
        return {"model": "base+" + base64.urlsafe_b64encode(data).decode().rstrip("=")}
    return {"model": "base", "adapter": {"data": b64(data), "scheme": "tiny13"}}


@contextlib.contextmanager
def target(client):
    """What to run under: the fields that say so, and the generations that the answer may be of (None: 404; "base": the bare base)."""
    world, rng = client.world, client.rng
    choice = rng.random()
    if choice < 0.15:
        yield {"model": "base"}, {"base"}
    elif choice < 0.4:
        data = rng.choice(world.numbers)
        yield inline(client, data), {world.generations[data]}
    else:
        name = rng.choice(world.names[client.tenant])
        forms = [{"model": name.name}, {"model": f"base:{name.name}"}, {"model": "base", "adapter": {"name": name.name}}]
        with name.watched() as seen:
            yield rng.choice(forms), seen


def parameters(client, chat):
    """How to decode, and whether the text is a function of it."""
    rng = client.rng
    fields = {"max_tokens": rng.choice([1, 6, 16, 24])}
    sampled = rng.random() < 0.5
    fields |= {"temperature": rng.choice([0.7, 1.0]), "top_p": rng.choice([0.9, 1])} if sampled else {"temperature": 0}
    if sampled and rng.random() < 0.7:
        fields["seed"] = rng.randrange(4)
    if rng.random() < 0.2:
        fields["n"] = rng.choice([2, 3])
    if rng.random() < 0.2:
        fields["stop"] = rng.choice(["e", ["the", "o"]])
    if rng.random() < 0.2:
        fields |= {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2}
    return fields, not sampled or "seed" in fields


def prompt(client):
    """A prompt that comes again, or one that does not, for the prefix cache to throw away."""
    if client.rng.random() < 0.6:
        return client.rng.choice(PROMPTS), True
    return "".join(client.rng.choices("abcdefghij klmnopqrst", k=client.rng.randrange(4, 60))), False


def generation_of(answer, allowed):
    """The generation that answered; None for a 404 that may be."""
    expect(answer.status in ((200, 404) if None in allowed else (200,)), f"{answer.status} where {allowed} may be")
    if answer.status == 404:
        return None
    generation = answer.headers.get("x-adapter-generation", "base")
    expect(generation in allowed, f"generation {generation} where {allowed} may be")
    return generation


def missing(text):
    expect(fault(text)["code"] in ("model_not_found", "adapter_not_found"), f"a 404 is {text!r}")


def check_head(value, body, kind):
    expect(value["object"] == kind and value["id"] and value["created"] > 0, value)
    expect(value["model"] == body["model"] and value["system_fingerprint"].startswith("fp_"), value)


def check_usage(usage):
    expect(usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] and usage["prompt_tokens"] > 0, usage)
    expect(0 <= usage["prompt_tokens_details"]["cached_tokens"] <= usage["prompt_tokens"], usage)


def check_text(text, reason, body):
    expect(isinstance(text, str) and reason in ("stop", "length"), (text, reason))
    stops = body.get("stop", [])
    for stop in [stops] if isinstance(stops, str) else stops:
        expect(stop not in text, f"{text!r} has its stop string")


def check_logprobs(logprobs, body, chat):
    if "logprobs" not in body:
        return expect(logprobs is None, logprobs)
    numbers = [entry["logprob"] for entry in logprobs["content"]] if chat else logprobs["token_logprobs"]
    expect(len(numbers) <= body["max_tokens"] and all(number <= 1e-6 for number in numbers), logprobs)
    if not chat:
        expect(len({len(logprobs[part]) for part in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}) == 1, logprobs)
    return None


def check_whole(value, body, chat):
    """A finished answer; its texts."""
    check_head(value, body, "chat.completion" if chat else "text_completion")
    check_usage(value["usage"])
    choices = value["choices"]
    expect([choice["index"] for choice in choices] == list(range(body.get("n", 1))), choices)
    texts = []
    for choice in choices:
        texts.append(choice["message"]["content"] if chat else choice["text"])
        check_text(texts[-1], choice["finish_reason"], body)
        check_logprobs(choice["logprobs"], body, chat)
        expect(not chat or choice["message"]["role"] == "assistant", choice)
    return texts


class Stream:
    """The chunks of a streamed answer, checked one by one."""

    def __init__(self, body, chat):
        self.body, self.chat = body, chat
        self.texts, self.reasons, self.ids = [""] * body.get("n", 1), [None] * body.get("n", 1), set()
        self.done = self.usage = False

    def take(self, data):
        expect(not self.done, "something comes after [DONE]")
        if data == "[DONE]":
            self.done = True
            return
        value = json.loads(data)
        expect("error" not in value, value)
        check_head(value, self.body, "chat.completion.chunk" if self.chat else "text_completion")
        self.ids.add(value["id"])
        if not value["choices"]:
            expect(not self.usage, "usage comes twice")
            self.usage = True
            return check_usage(value["usage"])
        (choice,) = value["choices"]
        index = choice["index"]
        expect(self.reasons[index] is None, f"a chunk after a choice's last: {value}")
        self.texts[index] += choice["delta"].get("content", "") if self.chat else choice["text"]
        self.reasons[index] = choice["finish_reason"]
        return None

    def whole(self):
        expect(self.done and self.usage and len(self.ids) == 1, f"a stream ends without its end: {self.__dict__}")
        for text, reason in zip(self.texts, self.reasons, strict=True):
            check_text(text, reason, self.body)
        return self.texts


def request(client, chat, fields):
    """Path, body, and a key for the text if it must be the same each time."""
    text, again = prompt(client)
    decoding, fixed = parameters(client, chat)
    body = fields | decoding | ({"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text})
    key = json.dumps([chat, text, {name: value for name, value in decoding.items() if "logprobs" not in name}]) if again and fixed else None
    return "/v1/chat/completions" if chat else "/v1/completions", body, key


def remember(client, generation, key, texts, body):
    if key is not None:
        client.world.same(tuple(texts), generation, key)
    if body["temperature"] == 0:
        expect(len(set(texts)) == 1, f"greedy choices differ: {texts}")


async def complete(client):
    chat = client.world.chats and client.rng.random() < 0.3
    with target(client) as (fields, allowed):
        path, body, key = request(client, chat, fields)
        kind = ("chat" if chat else "completion") + (", greedy" if body["temperature"] == 0 else ", sampled")
        async with client.ask(kind, "POST", path, body) as answer:
            text = await answer.read()
            generation = generation_of(answer, allowed)
            if generation is None:
                return missing(text)
            return remember(client, generation, key, check_whole(json.loads(text), body, chat), body)


async def stream(client):
    chat = client.world.chats and client.rng.random() < 0.3
    cut = client.rng.randrange(1, 6) if client.rng.random() < 0.4 else None
    with target(client) as (fields, allowed):
        path, body, key = request(client, chat, fields)
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        async with client.ask("stream, whole" if cut is None else "stream, cut", "POST", path, body) as answer:
            generation = generation_of(answer, allowed)
            if generation is None:
                return missing(await answer.read())
            chunks, taken = Stream(body, chat), 0
            async for data in answer.events():
                chunks.take(data)
                taken += 1
                if taken == cut:
                    return None  # the connection is closed with the answer half read
            return remember(client, generation, key, chunks.whole(), body)


async def greedy(client, kind, fields, generation):
    """The text of one adapter, compared with what its generation has said before."""
    body = fields | {"prompt": client.rng.choice(PROMPTS), "max_tokens": 16, "temperature": 0}
    async with client.ask(kind, "POST", "/v1/completions", body) as answer:
        value = json.loads(await answer.read())
        expect(answer.status == 200, value)
        generation_of(answer, {generation})
        texts = check_whole(value, body, False)
        key = json.dumps([False, body["prompt"], {"max_tokens": 16, "temperature": 0}])
        remember(client, generation, key, texts, body)


# Adapters


def check_adapter(value, name, headers, generation=None):
    expect(value["object"] == "adapter" and value["name"] == name and value["bytes"] == 26, value)
    expect(re.fullmatch("[0-9a-f]{32}", value["generation"]) and headers.get("etag") == f'"{value["generation"]}"', (value, headers))
    expect(generation in (None, value["generation"]), f"{name} has not generation {generation}: {value}")
    return value["generation"]


async def upload(client):
    """Numbers of its own from the upload to the deletion."""
    name, data, rng = f"{client.prefix}{client.turn}", bf16(client.rng), client.rng
    if rng.random() < 0.5:
        _, value, headers = await client.call("upload", "POST", f"/adapters?name={name}", data, (201,), form="application/octet-stream")
    else:
        _, value, headers = await client.call("upload", "POST", "/adapters", {"name": name, "data": b64(data), "metadata": {"of": name}}, (201,))
    generation = check_adapter(value, name, headers)
    await greedy(client, "completion, new adapter", {"model": name}, generation)
    await greedy(client, "completion, inline", inline(client, data), generation)
    _, value, headers = await client.call("show", "GET", f"/adapters/{name}")
    check_adapter(value, name, headers, generation)
    await export(client, name, data, generation)
    await client.refused("refused", 409, "name_taken", "POST", "/adapters", {"name": name, "data": b64(data)})
    await client.delete(name)
    await client.refused("refused", 404, "model_not_found", "POST", "/v1/completions", {"model": name, "prompt": "Once"})


async def export(client, name, data, generation):
    form = client.rng.choice(["raw", "json", "peft"])
    async with client.ask("export", "GET", f"/adapters/{name}/weights?format={form}") as answer:
        body = await answer.read()
        expect(answer.status == 200 and answer.headers["x-adapter-generation"] == generation, answer.headers)
        if form == "json":
            value = json.loads(body)
            expect(value["generation"] == generation and base64.b64decode(value["data"]) == data and len(value["numbers"]) == 13, value)
        else:
            expect(body == data if form == "raw" else body[:4] == b"PK\x03\x04", f"{form} is {body[:40]!r}")


async def batch(client):
    """Many at once; one line of them is wrong. Then they are listed and deleted."""
    rng = client.rng
    prefix = f"{client.prefix}{client.turn}-"
    items = {f"{prefix}{i:02}": bf16(rng) for i in range(rng.choice([1, 8, 40]))}
    spoilt = rng.choice(sorted(items))
    items[spoilt] = items[spoilt][:25]
    lines = b"\n".join(json.dumps({"name": name, "data": b64(data)}).encode() for name, data in items.items())
    async with client.ask("batch upload", "POST", "/adapters/batch", lines, form="application/x-ndjson") as answer:
        answers = [json.loads(line) for line in (await answer.read()).splitlines()]
        expect(answer.status == 200 and [line["name"] for line in answers] == list(items), answers)
        for line in answers:
            expect(set(line) == {"name", "error" if line["name"] == spoilt else "generation"}, line)
    names, after = [], ""
    while True:
        _, page, _ = await client.call("list", "GET", f"/adapters?limit=16&prefix={prefix}" + (f"&after={after}" if after else ""))
        expect(page["object"] == "list" and len(page["data"]) <= 16, page)
        names += [adapter["name"] for adapter in page["data"]]
        if not page["has_more"]:
            break
        after = names[-1]
    expect(names == [name for name in items if name != spoilt], f"a batch is listed as {names}")
    for name in names:
        await client.delete(name)


async def write(client):
    """One change of an adapter that others read meanwhile."""
    name = client.rng.choice(client.world.names[client.tenant])
    if name.lock.locked():
        return BUSY
    async with name.lock:
        try:
            return await change(client, name)
        except (Outage, Shed, Wrong) as error:
            while True:
                await client.after(error)
                try:
                    return await settle(client, name)
                except (Outage, Shed, Wrong) as again:
                    error = again


async def settle(client, name):
    """Which of the possible generations a name has, when an answer did not come."""
    status, value, headers = await client.call("show", "GET", f"/adapters/{name.name}", want=(200, 404))
    found = check_adapter(value, name.name, headers) if status == 200 else None
    allowed = set(name.may)
    name.settled(found)
    expect(found in allowed, f"{name.name} has {found} where {allowed} may be")


async def change(client, name):
    world, rng = client.world, client.rng
    path, before = f"/adapters/{name.name}", name.current
    first, second = rng.sample([data for data in world.numbers if world.generations[data] != before], 2)
    new, other = world.generations[first], world.generations[second]
    choice = rng.random()
    if before is None:
        name.writing(new)
        _, value, headers = await client.call("upload", "POST", "/adapters", {"name": name.name, "data": b64(first)}, (201,))
    elif choice < 0.45:
        name.writing(new)
        _, value, headers = await client.call("replace", "PUT", path, first, form="application/octet-stream")
    elif choice < 0.6:
        # Two want to be the next after the same generation: one is.
        name.writing(new, other)
        rival = Client(world, f"{client.prefix}rival", client.tenant)
        with contextlib.closing(rival.wire):
            answers = await asyncio.gather(*(
                who.call("compare and swap", "PUT", path, {"name": name.name, "data": b64(data)}, (200, 412), if_match=f'"{before}"')
                for who, data in ((client, first), (rival, second))), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        expect(sorted(status for status, _, _ in answers) == [200, 412], f"of two swaps from {before}: {answers}")
        (new, (_, value, headers)), = [(of, answer) for of, answer in zip((new, other), answers, strict=True) if answer[0] == 200]
        name.settled(new)
        await client.refused("compare and swap", 412, "generation_mismatch", "PUT", path, {"data": b64(first)}, if_match=f'"{before}"')
    elif choice < 0.75:
        _, page, _ = await client.call("list", "GET", f"{path}/generations")
        expect([entry["generation"] for entry in page["data"] if entry["current"]] == [before], page)
        new = rng.choice(page["data"])["generation"]
        name.writing(new)
        _, value, headers = await client.call("rollback", "POST", f"{path}/rollback", {"generation": new})
    else:
        name.writing(None)
        await client.delete(name.name)
        return name.settled(None)
    name.settled(new)
    check_adapter(value, name.name, headers, new)
    return None


async def look(client):
    """Lists, models, health."""
    rng, names = client.rng, client.world.names[client.tenant]
    choice = rng.randrange(4)
    if choice == 0:
        _, page, _ = await client.call("list", "GET", f"/adapters?limit=100&prefix={client.tenant}-")
        found = [adapter["name"] for adapter in page["data"]]
        expect(found == sorted(found) and set(found) <= {name.name for name in names} and not page["has_more"], found)
    elif choice == 1:
        _, page, _ = await client.call("list", "GET", "/v1/models")
        expect(page["data"][0]["id"] == "base" and all(model["object"] == "model" for model in page["data"]), page)
    elif choice == 2:
        _, page, _ = await client.call("list", "GET", f"/adapters/train?limit={rng.choice([1, 20])}")
        expect(all(job["object"] == "adapter.training_job" for job in page["data"]), page)
    else:
        _, value, _ = await client.call("list", "GET", "/adapters/schemes")
        expect(value["base"] == "base" and value["schemes"][0]["numbers"] == 13, value)


# Training


async def train(client):
    """A job, followed to its end or cancelled on the way."""
    gate = client.world.jobs[client.tenant]
    if gate.locked():
        return BUSY
    async with gate:
        rng, name = client.rng, f"{client.prefix}job-{client.turn}"
        method = rng.choice(["grpo", "sft", "es"])
        hyper = {"steps": rng.randrange(1, 4), "prompts_per_step": 2, "max_completion_tokens": 4}
        hyper |= {"grpo": {"samples_per_prompt": 2, "flat_reward_steps": 0}, "es": {"population": 4, "flat_reward_steps": 0}, "sft": {}}[method]
        body = {"name": name, "method": method, "hyperparameters": hyper, "dataset": [
            {"prompt": "Once", "completion": " upon", "answer": "e"}, {"prompt": "The fox", "completion": " ate", "answer": "e"}]}
        if method != "sft":
            body["grader"] = {"type": "string_check", "input": "{{sample.output_text}}", "reference": "{{item.answer}}", "operation": "like"}
        _, job, _ = await client.call("train", "POST", "/adapters/train", body, (202,))
        expect(job["object"] == "adapter.training_job" and job["name"] == name, job)
        path = f"/adapters/train/{job['id']}"
        ended = rng.random() < 0.7 and await follow(client, path, rng.uniform(0.05, 0.5) * min(60, client.world.args.minutes * 60))
        if not ended:
            await client.call("train", "POST", f"{path}/cancel", b"", (200, 409))
        _, job, _ = await client.call("train", "GET", path)
        expect(job["status"] in ("succeeded", "cancelled"), f"a job ended thus: {job}")
        expect(job["status"] == "succeeded" or not ended, f"nobody cancelled {job}")
        if job["status"] == "cancelled":
            return await client.refused("show", 404, "adapter_not_found", "GET", f"/adapters/{name}")
        generation = job["result"]["generation"]
        _, value, headers = await client.call("show", "GET", f"/adapters/{name}")
        check_adapter(value, name, headers, generation)
        await greedy(client, "completion, new adapter", {"model": name}, generation)
        _, page, _ = await client.call("train", "GET", f"{path}/checkpoints")
        expect(all(len(base64.b64decode(entry["data"])) == 26 for entry in page["data"]), page)
        return await client.delete(name)


async def follow(client, path, patience):
    """Reads a job's events for a time; has the job ended?"""
    deadline, last = time.monotonic() + patience, 0
    async with client.ask("train, events", "GET", f"{path}/events", breaks=True, accept="text/event-stream") as answer:
        expect(answer.status == 200, answer.status)
        events = answer.events()
        while not client.world.stop.is_set():
            try:
                data = await asyncio.wait_for(anext(events), deadline - time.monotonic())
            except (TimeoutError, StopAsyncIteration):
                break
            if data == "[DONE]":
                expect(last > 0, "a job without events")
                return True
            event = json.loads(data)
            expect(event["object"] == "adapter.training_event" and event["id"] == last + 1, f"after event {last}: {event}")
            last = event["id"]
    return False


# What must be refused


async def refuse(client):
    rng, names = client.rng, client.world.names
    foreign = rng.choice([name.name for tenant in TENANTS if tenant != client.tenant for name in names[tenant]])
    ask = {"model": "base", "prompt": "Once"}
    cases = [
        (400, None, "POST", "/v1/completions", b'{"model": "base", "prompt": ', {}),
        (400, None, "POST", "/v1/completions", ask | {"temperature": 9}, {}),
        (400, None, "POST", "/v1/completions", ask | {"suffix": "x"}, {}),
        (400, None, "POST", "/v1/completions", {"model": "base"}, {}),
        (400, None, "POST", "/v1/completions", ask | {"adapter": {"data": b64(bytes(25))}}, {}),
        (404, "model_not_found", "POST", "/v1/completions", ask | {"model": foreign}, {}),
        (404, "model_not_found", "POST", "/v1/completions", ask | {"model": "nobody", "stream": True}, {}),
        (404, "adapter_not_found", "GET", f"/adapters/{foreign}", None, {}),
        (404, "adapter_not_found", "DELETE", f"/adapters/{foreign}", None, {}),
        (404, "adapter_not_found", "PUT", "/adapters/nobody", bytes(26), {"form": "application/octet-stream"}),
        (404, "job_not_found", "GET", "/adapters/train/ftjob-none", None, {}),
        (400, None, "POST", f"/adapters?name={client.prefix}bad", bytes(27), {"form": "application/octet-stream"}),
        (400, None, "POST", f"/adapters?name={client.prefix}bad", b"\x80\x7f" * 13, {"form": "application/octet-stream"}),
        (422, "incompatible_adapter", "POST", "/adapters", {"name": f"{client.prefix}bad", "data": b64(bytes(26)), "fingerprint": "0" * 64}, {}),
        (415, None, "POST", "/v1/completions", b"prompt=Once", {"form": "text/plain"}),
        (401, "invalid_api_key", "POST", "/v1/completions", ask, {"key": "mote-wrong"}),
        (403, None, "GET", "/admin/tenants", None, {}),
        (405, None, "DELETE", "/v1/models", None, {}),
        (400, None, "POST", "/adapters/train", {"name": f"{client.prefix}bad", "dataset": [], "hyperparameters": {"learning_rat": 1}}, {}),
    ]
    status, code, method, path, body, how = rng.choice(cases)
    _, value, _ = await client.call("refused", method, path, body, (status,), **how)
    expect(code in (None, value["error"]["code"]), f"{method} {path}: {value}")


ACTIONS = [(complete, 40), (stream, 20), (upload, 6), (batch, 1.5), (write, 10), (look, 6), (train, 2), (refuse, 8)]


# The run


def figures(text):
    """Metrics by name, with their labels."""
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, value in lines} | {"lines": len(lines)}


def process(pid):
    status = pathlib.Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    number = {name: int(re.search(rf"{name}:\s+(\d+)", status)[1]) for name in ("VmRSS", "Threads")}
    return {"resident MiB": number["VmRSS"] / 1024, "threads": number["Threads"], "descriptors": len(os.listdir(f"/proc/{pid}/fd"))}


class Sampler:
    """Looks at the process and at /metrics again and again."""

    def __init__(self, world):
        self.world, self.client, self.samples = world, Client(world, "sampler", None), []

    async def metrics(self):
        async with self.client.ask("metrics", "GET", "/metrics") as answer:
            text = (await answer.read()).decode()
            expect(answer.status == 200 and text.endswith("# EOF\n"), text[-200:])
            return figures(text)

    async def sample(self):
        found = await self.metrics()
        return process(self.world.server.process.pid) | {
            "connections": found["mote_connections"], "KV blocks used": found['mote_engine_kv_blocks{state="used"}'], "metric lines": found["lines"],
            "KV blocks cached": found['mote_engine_kv_blocks{state="cached"}'], "adapters": found["mote_adapters_resident"],
            "running": found["mote_engine_running"], "queue": found["mote_engine_queue"], "training": found["mote_training_running"],
        }

    async def run(self, interval):
        while not self.world.stop.is_set():
            try:
                self.samples.append(await self.sample())
            except (Outage, Shed):
                pass
            except Wrong as error:
                self.world.wrong(str(error))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.world.stop.wait(), interval)

    async def idle(self, blocks):
        """The server with nothing to do."""
        deadline = time.monotonic() + 60
        while True:
            found = await self.metrics()
            ended = sum(found[f"mote_engine_{how}_total"] for how in ("finished", "cancelled", "failed", "expired"))
            state = {name: int(found[f"mote_engine_kv_blocks{{state=\"{name}\"}}"]) for name in ("free", "cached", "used")}
            state |= {name: int(found[f"mote_{name}"]) for name in ("engine_running", "engine_queue", "training_running", "connections")}
            state["unaccounted"] = int(found["mote_engine_accepted_total"] - ended)
            busy = [name for name in ("used", "engine_running", "engine_queue", "training_running", "unaccounted") if state[name]]
            if not busy and state["connections"] == 1 and state["free"] + state["cached"] == blocks:
                break
            if time.monotonic() > deadline:
                self.world.wrong(f"60 s after the load the server is not idle: {state}, of {blocks} KV blocks")
                break
            await asyncio.sleep(0.1)
        for what in ("failed", "failed_steps"):
            if found[f"mote_engine_{what}_total"]:
                self.world.wrong(f"mote_engine_{what}_total is {found[f'mote_engine_{what}_total']}")
        return state

    async def kept(self):
        """Each tenant has the adapters that were acknowledged, and no others."""
        live = 0
        for tenant in TENANTS:
            client = Client(self.world, f"{tenant}-kept", tenant)
            _, page, _ = await client.call("list", "GET", "/adapters?limit=1000")
            client.wire.close()
            found = {adapter["name"]: adapter["generation"] for adapter in page["data"]}
            wanted = {name.name: name.current for name in self.world.names[tenant] if name.current is not None}
            live += len(wanted)
            if found != wanted:
                self.world.wrong(f"{tenant} has {found}, acknowledged {wanted}")
        resident = (await self.metrics())["mote_adapters_resident"]
        if resident != live:
            self.world.wrong(f"{resident} adapters are resident where tenants have {live}")


async def prepare(world, sampler):
    """Tenants, keys, the generations of the numbers, and whether the model chats. The number of KV blocks."""
    admin = sampler.client
    for tenant in TENANTS:
        await admin.call("set-up", "POST", "/admin/tenants", {"name": tenant}, (201,))
        _, made, _ = await admin.call("set-up", "POST", f"/admin/tenants/{tenant}/keys", {"role": "member"}, (201,))
        world.keys[tenant] = made["key"]
    for data in world.numbers:
        _, value, headers = await admin.call("set-up", "POST", "/adapters?name=first", data, (201,), form="application/octet-stream")
        world.generations[data] = check_adapter(value, "first", headers)
        await admin.call("set-up", "DELETE", "/adapters/first", want=(204,))
    expect(len(set(world.generations.values())) == NUMBERS, "two numbers have one generation")
    body = {"model": "base", "messages": [{"role": "user", "content": "Once"}], "max_tokens": 1}
    status, value, _ = await admin.call("set-up", "POST", "/v1/chat/completions", body, (200, 400))
    world.chats = status == 200
    expect(world.chats or value["error"]["code"] == "no_chat_template", value)
    found = await sampler.metrics()
    return sum(int(found[f'mote_engine_kv_blocks{{state="{state}"}}']) for state in ("free", "used", "cached"))


@contextlib.asynccontextmanager
async def load(world):
    """All clients, until the block ends; then each finishes what it is at."""
    world.stop.clear()
    clients = [Client(world, number, TENANTS[number % len(TENANTS)]) for number in range(world.args.clients)]
    tasks = [asyncio.create_task(client.run()) for client in clients]
    try:
        yield
    finally:
        world.stop.set()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, BaseException):
                world.wrong(f"a client died: {result!r}")


def fifths(samples):
    """Medians of the measured time's first, middle and last fifth."""
    fifth = max(1, len(samples) // 5)
    middle = (len(samples) - fifth) // 2
    parts = samples[:fifth], samples[middle:middle + fifth], samples[-fifth:]
    return {name: [statistics.median(sample[name] for sample in part) for part in parts] for name in samples[0]}


async def run(world):
    args, sampler = world.args, Sampler(world)
    seconds = args.minutes * 60
    interval = min(1.0, seconds / 60)
    await world.start()
    blocks = await prepare(world, sampler)
    watch, restarts = None, []
    async with load(world):
        await asyncio.sleep(seconds * WARM_UP / 3)
        restarts.append(await world.end())
        await world.start()
        await asyncio.sleep(seconds * WARM_UP * 2 / 3)
        watch = asyncio.create_task(sampler.run(interval))
        await asyncio.sleep(seconds * (1 - WARM_UP))
    await watch
    idle = await sampler.idle(blocks)
    await sampler.kept()
    async with load(world):
        await asyncio.sleep(min(10.0, seconds / 10))
        restarts.append(await world.end())
        await world.start()
        await asyncio.sleep(min(10.0, seconds / 10))
    await sampler.idle(blocks)
    await sampler.kept()
    sampler.client.wire.close()
    await world.end()
    grown = fifths(sampler.samples)
    for name, (part, more) in ALLOWED.items():
        first, _, last = grown[name]
        if last > first * (1 + part) + more:
            world.wrong(f"{name} grew from {first:.1f} to {last:.1f}; {part:.0%} and {more} are allowed")
    return {
        "samples": len(sampler.samples), "growth": grown, "idle": idle, "restart_seconds": [round(took, 2) for took in restarts],
        # Evenly over the measured time, to see the shape of what grew.
        "course": {name: [round(sample[name], 1) for sample in sampler.samples[::max(1, len(sampler.samples) // 60)]] for name in ALLOWED},
    }


def quantile(times, part):
    """Seconds, to 2 %."""
    left = part * times.total()
    for bucket, count in sorted(times.items()):
        left -= count
        if left <= 0:
            return 1.02**bucket
    return 0.0


def summary(world, found, took):
    kinds = {kind: {
        "requests": counts.total(), "status": dict(sorted(counts.items())),
        "p50_ms": round(quantile(world.times[kind], 0.5) * 1000, 2), "p99_ms": round(quantile(world.times[kind], 0.99) * 1000, 2),
    } for kind, counts in sorted(world.counts.items())}
    return {
        "minutes": round(took / 60, 2), "clients": world.args.clients, "seed": world.args.seed, "requests": sum(kind["requests"] for kind in kinds.values()),
        "texts_compared": world.compared, "violations": world.violated, "first_violations": world.violations, "kinds": kinds,
    } | found


def show(result):
    print(f"\n{'requests':<26}{'number':>9}{'p50 ms':>9}{'p99 ms':>9}  by status")
    for kind, row in result["kinds"].items():
        status = ", ".join(f"{status}: {count}" for status, count in row["status"].items())
        print(f"{kind:<26}{row['requests']:>9}{row['p50_ms']:>9.1f}{row['p99_ms']:>9.1f}  {status}")
    print(f"\n{'medians of a fifth':<26}{'first':>9}{'middle':>9}{'last':>9}  allowed")
    for name, row in result.get("growth", {}).items():
        part, more = ALLOWED.get(name, (None, None))
        allowed = f"{row[0] * (1 + part) + more:.1f}" if part is not None else "not judged"
        print(f"{name:<26}" + "".join(f"{value:>9.1f}" for value in row) + f"  {allowed}")
    print(f"\nidle after the load: {result.get('idle')}; stopped under load in {result.get('restart_seconds')} s")
    print(f"{result['minutes']} minutes, {result['clients']} clients, {result['requests']} requests, {result['texts_compared']} texts compared, seed {result['seed']}")
    for words in result["first_violations"][:20]:
        print("  WRONG:", words)
    print(f"verdict: {result['violations']} violations" if result["violations"] else "verdict: nothing is wrong")


def model(args, folder):
    """The tiny golden model with a chat template, if no other is asked for."""
    args.tiny = args.model is None
    if args.tiny:
        args.model = os.path.join(folder, "model")
        shutil.copytree(ROOT / "tests/fixtures/golden/llama/model", args.model)
        pathlib.Path(args.model, "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


async def soak(args, folder):
    world, started, found = World(args, folder, args.seed), time.monotonic(), {}
    try:
        found = await run(world)
    except (Wrong, Outage, Shed) as error:
        world.wrong(f"the run ended: {error!r}")
    finally:
        if world.server is not None and world.server.process.poll() is None:
            world.server.kill()
    return summary(world, found, time.monotonic() - started)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mote", default=os.environ.get("MOTE_BIN", str(ROOT / "target/debug/mote")), help="the binary")
    parser.add_argument("--minutes", type=float, default=10, help="of load, warm-up included; two restarts and two looks at the idle server come on top")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seed", type=int, default=None, help="of what clients choose; when each gets its turn is not the seed's")
    parser.add_argument("--model", default=None, help="as of `mote serve` [default: a tiny golden model]")
    actions = [action.__name__ for action, _ in ACTIONS]
    parser.add_argument("--only", nargs="+", choices=actions, default=actions, help="to find out what a violation comes from")
    parser.add_argument("--json", default=None, metavar="FILE", help="write the summary there too")
    args = parser.parse_args()
    args.seed = args.seed if args.seed is not None else random.randrange(1 << 30)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server ends too
    print(f"seed {args.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        model(args, folder)
        result = asyncio.run(soak(args, folder))
    show(result)
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if result["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
