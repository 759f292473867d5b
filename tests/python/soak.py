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

SIGINT ends the measured time early; the verdict is then of what was measured.

Times are those that a client sees in one Python process beside the server: they are for comparing kinds, not for measuring Mote.
"""

import argparse
import asyncio
import contextlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time

from kill9 import ROOT
from soak_actions import ACTIONS, check_adapter
from soak_world import NUMBERS, TENANTS, Client, Outage, Shed, World, Wrong, expect

WARM_UP = 0.15
# Threads that an idle server may have beyond those that it began with.
MORE_THREADS = 8
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"
# What may be added to the first fifth's median: a part of it, and so much besides. Threads are judged at rest: under load the runtime's pool for blocking work has as many
# as wait for a processor, and they end ten seconds after.
ALLOWED = {
    "resident MiB": (0.05, 16), "descriptors": (0.10, 16), "connections": (0.10, 8),
    "KV blocks used": (0.25, 32), "metric lines": (0.02, 40),
}


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

    async def idle(self, blocks, threads):
        """The server with nothing to do; it had so many threads when it began."""
        deadline = time.monotonic() + 60
        while True:
            found = await self.metrics()
            ended = sum(found[f"mote_engine_{how}_total"] for how in ("finished", "cancelled", "failed", "expired"))
            state = {name: int(found[f"mote_engine_kv_blocks{{state=\"{name}\"}}"]) for name in ("free", "cached", "used")}
            state |= {name: int(found[f"mote_{name}"]) for name in ("engine_running", "engine_queue", "training_running", "connections")}
            state["unaccounted"] = int(found["mote_engine_accepted_total"] - ended)
            state["threads"] = process(self.world.server.process.pid)["threads"]
            busy = [name for name in ("used", "engine_running", "engine_queue", "training_running", "unaccounted") if state[name]]
            if not busy and state["connections"] == 1 and state["free"] + state["cached"] == blocks and state["threads"] <= threads + MORE_THREADS:
                break
            if time.monotonic() > deadline:
                self.world.wrong(f"60 s after the load the server is not idle: {state}, of {blocks} KV blocks and {threads} threads at the start")
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
    tasks = [asyncio.create_task(client.run(ACTIONS)) for client in clients]
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
    threads = process(world.server.process.pid)["threads"]
    blocks = await prepare(world, sampler)
    watch, restarts = None, []
    async with load(world):
        await asyncio.sleep(seconds * WARM_UP / 3)
        restarts.append(await world.end())
        await world.start()
        await asyncio.sleep(seconds * WARM_UP * 2 / 3)
        watch = asyncio.create_task(sampler.run(interval))
        # So long, or until SIGINT asks for the verdict now.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(world.enough.wait(), seconds * (1 - WARM_UP))
    await watch
    idle = await sampler.idle(blocks, threads)
    await sampler.kept()
    async with load(world):
        await asyncio.sleep(min(10.0, seconds / 10))
        restarts.append(await world.end())
        await world.start()
        await asyncio.sleep(min(10.0, seconds / 10))
    await sampler.idle(blocks, threads)
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
        "minutes": round(took / 60, 2), "clients": world.args.clients, "pause": world.args.pause, "seed": world.args.seed, "requests": sum(kind["requests"] for kind in kinds.values()),
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
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, world.enough.set)
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
    parser.add_argument("--pause", type=float, default=0, help="seconds that a client waits on average before it does the next thing")
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
