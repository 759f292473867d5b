"""The soak's server, the clients that ask it, and what they know together."""

import asyncio
import base64
import collections
import contextlib
import json
import math
import os
import random
import signal
import subprocess
import time

import kill9
from kill9 import bf16

ADMIN_KEY = "admin-key-of-the-soak-test"
TENANTS = ("ann", "ben", "cid")
NAMES = 8  # adapters of a tenant that all its clients write and read
NUMBERS = 24  # of 26 bytes each, which those adapters have in turn
JOBS = 2  # under way at once by a tenant
PATIENCE = 120.0  # seconds for an answer
BUSY = object()  # what an action answers when others are at it
TEXTS = 100_000  # remembered for comparison


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
        self.up, self.stop, self.enough = asyncio.Event(), asyncio.Event(), asyncio.Event()
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

    async def run(self, actions):
        """Does one thing after another, each as often as its weight among (thing, weight) says."""
        kinds, weights = zip(*((action, weight) for action, weight in actions if action.__name__ in self.world.args.only), strict=True)
        while not self.world.stop.is_set():
            self.turn += 1
            (action,) = self.rng.choices(kinds, weights)
            try:
                if await action(self) is BUSY:
                    await asyncio.sleep(0.05)
            except (Outage, Shed, Wrong) as error:
                await self.after(error)
            if self.world.args.pause and not self.world.stop.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.world.stop.wait(), self.rng.expovariate(1 / self.world.args.pause))
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
