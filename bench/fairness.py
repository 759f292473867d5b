#!/usr/bin/env python3
"""What a tenant that floods leaves to one that sends a request at a time, and how two that flood share.

    python3 bench/fairness.py --mote target/release/mote --out bench/results/fairness.json

One server, two tenants. In turn, `--rounds` times:

- full: a client of the second tenant sends `--requests` requests one after another while `--flood` - 1 others of its own tenant keep the batch full;
- beside: the same client, while `--flood` clients of the first tenant keep the batch full;
- both: `--flood` clients of each for `--seconds`.

It reports the steps that the single client's requests waited for a place (`mote_engine_first_place_steps`: of sequences that came when their tenant had none; target: 1 at p99), the
p50 of its latency beside the flood over that in a full batch of its own (target: at most 1.2), and each tenant's part of the tokens (a prompt token counts 1, a completion token
2) over its part by weight (target: within 5 %). `--weights 1,3` gives the tenants these weights.
"""

import argparse
import asyncio
import itertools
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from peers import client, machine, prompts, servers  # noqa: E402

TENANTS = ("flood", "single")


class Mote:
    """The server, and a key of each tenant."""

    def __init__(self, args, folder: Path):
        self.port = servers.free_port()
        data = folder / "data"
        command = [args.mote, "serve", "--listen", f"127.0.0.1:{self.port}", "--data-dir", data, "--max-batch", args.flood, *args.flags.split()]
        self.server = servers.Server("mote", command + (["--model", args.model] if args.model else []), folder / "log.txt")
        self.server.port, self.server.health = self.port, "/readyz"
        self.server.start()
        self.server.__enter__()

        def create(*flags) -> str:
            command = [args.mote, "keys", "create", "--data-dir", data, *flags]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

        self.keys = {tenant: create("--tenant", tenant) for tenant in TENANTS}
        self.admin = create("--tenant", "operators", "--role", "admin")
        for tenant, weight in zip(TENANTS, args.weights):
            subprocess.run([args.mote, "tenants", "limits", tenant, "--weight", str(weight), "--data-dir", data], check=True, capture_output=True)
        time.sleep(1.5)  # the server honours them within a second
        status, models = client.call(self.port, "/v1/models", key=self.keys["single"])
        if status != 200:
            raise SystemExit(f"/v1/models: {status}: {models[:300]!r}")
        self.model = json.loads(models)["data"][0]["id"]
        self.texts = itertools.cycle(prompts.short(7, 20_000))
        self.sent = 0

    def request(self, tenant: str, tokens: int, stream: bool) -> bytes:
        """A request that no other repeats."""
        self.sent += 1
        body = {"model": self.model, "prompt": next(self.texts), "max_tokens": tokens, "temperature": 1.0, "seed": self.sent, "ignore_eos": True}
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return client.request("/v1/completions", body, key=self.keys[tenant])

    async def metrics(self) -> str:
        status, text = await asyncio.to_thread(client.call, self.port, "/metrics", None, key=self.admin)
        if status != 200:
            raise SystemExit(f"/metrics: {status}")
        return text.decode()

    def flood_length(self) -> int:
        """Of the next request of a flood: lengths differ, so that they do not all end at once."""
        return 64 + self.sent * 29 % 129


def counted(text: str, name: str) -> float:
    found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def buckets(text: str, name: str) -> dict[float, float]:
    return {float(bound): float(count) for bound, count in re.findall(rf'^{name}_bucket{{le="([^"]+)"}} (\S+)$', text, re.MULTILINE)}


def bound_of(before: dict, after: dict, share: float) -> float:
    """The bucket's bound below which so much of a histogram's growth lies."""
    grown = {bound: after[bound] - before.get(bound, 0.0) for bound in after}
    return min((bound for bound, count in grown.items() if count >= share * grown[math.inf]), default=math.inf)


async def floods(mote: Mote, clients: list[tuple[str, int]], go_on, start: float) -> list[tuple[str, asyncio.Task]]:
    return [
        (tenant, asyncio.create_task(client.closed_loop(mote.port, lambda tenant=tenant: mote.request(tenant, mote.flood_length(), False), False, go_on, start)))
        for tenant, count in clients
        for _ in range(count)
    ]


async def full_batch(mote: Mote, flood: int) -> None:
    """Waits until the flood has every place."""
    while counted(await mote.metrics(), "mote_engine_running") < flood:
        await asyncio.sleep(0.1)
    await asyncio.sleep(1)


async def one_at_a_time(mote: Mote, args, tenant: str, flood: int) -> dict:
    """The single client beside `flood` clients of a tenant."""
    start, stop = time.perf_counter(), asyncio.Event()
    tasks = await floods(mote, [(tenant, flood)], lambda _: not stop.is_set(), start)
    await full_batch(mote, flood)
    before = await mote.metrics()
    single = await client.closed_loop(
        mote.port, lambda: mote.request("single", args.tokens, True), True, lambda answers: len(answers) < args.requests, start
    )
    after = await mote.metrics()
    stop.set()
    await asyncio.gather(*(task for _, task in tasks))
    places = "mote_engine_first_place_steps"
    steps = {name: counted(after, f"mote_engine_{name}") - counted(before, f"mote_engine_{name}") for name in ("step_sequences_sum", "step_sequences_count")}
    return {
        "latency_s": [answer.done - answer.sent for answer in single],
        "first_token_s": [answer.events[0] - answer.sent for answer in single],
        "places": counted(after, f"{places}_count") - counted(before, f"{places}_count"),
        "place_steps_p99": bound_of(buckets(before, places), buckets(after, places), 0.99),
        "yielded": counted(after, "mote_engine_yielded_total") - counted(before, "mote_engine_yielded_total"),
        "mean_batch": steps["step_sequences_sum"] / steps["step_sequences_count"],
    }


async def both(mote: Mote, args) -> dict:
    """Costs of the answers that came in the time, by tenant."""
    start = time.perf_counter()
    warm = args.seconds / 4
    tasks = await floods(mote, [(tenant, args.flood) for tenant in TENANTS], lambda _: time.perf_counter() - start < warm + args.seconds, start)
    cost = dict.fromkeys(TENANTS, 0)
    for tenant, task in tasks:
        for answer in await task:
            if warm <= answer.done < warm + args.seconds:
                cost[tenant] += answer.prompt_tokens + 2 * answer.completion_tokens
    weights = dict(zip(TENANTS, args.weights))
    part = {tenant: cost[tenant] / sum(cost.values()) for tenant in TENANTS}
    return {"cost": cost, "part": part, "part_over_due": {tenant: part[tenant] * sum(args.weights) / weights[tenant] for tenant in TENANTS}}


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def figures(found: dict) -> dict:
    full, beside = found["full"], found["beside"]
    p50 = {name: quantile(found[name]["latency_s"], 0.5) for name in ("full", "beside")}
    return {
        "latency_p50_full_ms": 1e3 * p50["full"],
        "latency_p50_beside_ms": 1e3 * p50["beside"],
        "latency_ratio": p50["beside"] / p50["full"],
        "first_token_p50_full_ms": 1e3 * quantile(full["first_token_s"], 0.5),
        "first_token_p50_beside_ms": 1e3 * quantile(beside["first_token_s"], 0.5),
        "first_token_p99_beside_ms": 1e3 * quantile(beside["first_token_s"], 0.99),
        "places_beside": beside["places"],
        "place_steps_p99": beside["place_steps_p99"],
        "yielded_a_request": beside["yielded"] / len(beside["latency_s"]),
        "mean_batch_full": full["mean_batch"],
        "mean_batch_beside": beside["mean_batch"],
        "part_over_due_flood": found["both"]["part_over_due"]["flood"],
        "part_over_due_single": found["both"]["part_over_due"]["single"],
    }


def line(found: dict) -> str:
    it = figures(found)
    return (
        f"one at a time: p50 {it['latency_p50_full_ms']:.0f} ms in a full batch of its own, {it['latency_p50_beside_ms']:.0f} beside the flood: {it['latency_ratio']:.2f} times; "
        f"first token p50/p99 {it['first_token_p50_beside_ms']:.0f}/{it['first_token_p99_beside_ms']:.0f} ms; a place within {it['place_steps_p99']:.0f} step(s) at p99 of {it['places_beside']:.0f}; "
        f"{it['yielded_a_request']:.2f} preemptions a request; both saturating: {it['part_over_due_flood']:.3f} and {it['part_over_due_single']:.3f} of what is due"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mote", type=Path, default=Path("target/release/mote"))
    parser.add_argument("--model")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--flood", type=int, default=64, help="clients of a flood, and places in the batch")
    parser.add_argument("--requests", type=int, default=40, help="of the single client in a round, one after another")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of an answer to the single client")
    parser.add_argument("--seconds", type=float, default=60, help="both saturating, after a quarter of that to warm up")
    parser.add_argument("--weights", type=lambda text: [int(part) for part in text.split(",")], default=[1, 1], help="of the tenants flood and single")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--flags", default="", help="more flags of mote serve")
    args = parser.parse_args()
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        mote = Mote(args, Path(folder))
        try:
            for number in range(args.rounds):
                cases = {"full": lambda: one_at_a_time(mote, args, "single", args.flood - 1), "beside": lambda: one_at_a_time(mote, args, "flood", args.flood), "both": lambda: both(mote, args)}
                order = list(cases) if number % 2 == 0 else list(reversed(cases))
                found = {name: asyncio.run(cases[name]()) for name in order}
                rounds.append(found)
                print(line(found), flush=True)
        finally:
            mote.server.stop()
    all_figures = [figures(found) for found in rounds]
    medians = {name: statistics.median(it[name] for it in all_figures) for name in all_figures[0]}
    print("medians: " + ", ".join(f"{name} {value:.3g}" for name, value in medians.items()))
    if args.out:
        facts = {"machine": machine.describe(), "flood": args.flood, "tokens": args.tokens, "requests": args.requests, "weights": args.weights, "rounds": all_figures, "medians": medians}
        args.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
