#!/usr/bin/env python3
"""What a training job costs those who are served meanwhile, and what they leave to it.

    python3 bench/while_training.py --mote target/release/mote --out bench/results/while-training.json

One server. In turn, `--rounds` times: 8 streaming clients alone; the job alone; both. It reports the p50 and p99 time between tokens with the job over without it (target: below
2.5), whether the texts of those streams are the same (they are greedy and sampled with seeds), and the job's speed beside the clients over its speed alone, next to 1 - the clients'
share of the engine's time (target: at least 60 % of it). The job's speed is steps a second, over at least `--steps` steps and `--seconds` seconds, every one of which costs about the
same: all its groups have something to learn from.
"""

import argparse
import json
import re
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from peers import client, machine, prompts, servers  # noqa: E402


def job(name: str, steps: int) -> dict:
    """A job that goes on until it is cancelled, in small steps. Its reward is how short a completion is, which varies in nearly every group."""
    items = [{"messages": [{"role": "user", "content": f"What is {a} plus {b}?"}], "answer": a + b} for a in range(3, 19) for b in range(4, 20)]
    return {
        "name": name,
        "method": "grpo",
        "dataset": items,
        "grader": {"type": "length", "max": 1, "falloff": 2000},
        "hyperparameters": {"steps": steps, "prompts_per_step": 2, "samples_per_prompt": 4, "max_completion_tokens": 24, "learning_rate": 1e-6, "flat_reward_steps": 0},
    }


class Mote:
    """The server, and what it counts."""

    def __init__(self, binary: Path, model: str | None, folder: Path, flags: list[str]):
        self.port = servers.free_port()
        command = [binary, "serve", "--no-auth", "--listen", f"127.0.0.1:{self.port}", "--data-dir", folder / "data", *flags]
        self.server = servers.Server("mote", command + (["--model", model] if model else []), folder / "log.txt")
        self.server.port, self.server.health = self.port, "/readyz"
        self.server.start()
        self.server.__enter__()

    def post(self, path: str, body: dict) -> dict:
        status, answer = client.call(self.port, path, body)
        if status not in (200, 202):
            raise SystemExit(f"{path}: {status}: {answer[:400]!r}")
        return json.loads(answer)

    def get(self, path: str) -> dict:
        return json.loads(client.call(self.port, path)[1])

    def seconds(self) -> dict[str, float]:
        """Seconds of the engine's thread so far: its phases, and steps by whose rows they had."""
        text = client.call(self.port, "/metrics")[1].decode()
        found = re.findall(r'mote_engine_(?:phase|step_share)_seconds_total\{(?:phase|class)="(\w+)"\} (\S+)', text)
        return {name: float(value) for name, value in found}


def begin(mote: Mote, name: str) -> str:
    """Makes the job and waits until it is in its second step."""
    id = mote.post("/adapters/train", job(name, 20_000))["id"]
    while mote.get(f"/adapters/train/{id}")["step"] < 1:
        time.sleep(0.05)
    return id


def end(mote: Mote, id: str) -> None:
    mote.post(f"/adapters/train/{id}/cancel", {})
    while mote.get(f"/adapters/train/{id}")["status"] not in ("cancelled", "failed"):
        time.sleep(0.05)


def steps_in(mote: Mote, id: str, seconds: float, steps: int) -> tuple[float, dict[str, float]]:
    """Steps a second of a job, from the end of one step to the end of another, at least so many and in so long, and what the engine did meanwhile."""

    def next_end() -> tuple[int, float]:
        before = mote.get(f"/adapters/train/{id}")["step"]
        while True:
            now = mote.get(f"/adapters/train/{id}")["step"]
            if now > before:
                return now, time.perf_counter()
            # Seldom: this process also takes the times of the clients.
            time.sleep(0.25)

    first, began = next_end()
    counted = mote.seconds()
    while True:
        last, ended = next_end()
        if ended - began >= seconds and last - first >= steps:
            break
    after = mote.seconds()
    return (last - first) / (ended - began), {name: after[name] - counted[name] for name in after}


def texts_of(loads: list[client.Load]) -> dict[bytes, set[str]]:
    """What each request was answered, over all loads."""
    texts: dict[bytes, set[str]] = {}
    for answer in (answer for load in loads for answer in load.answers):
        texts.setdefault(answer.data, set()).add("".join(answer.pieces))
    return texts


def gaps(load: client.Load) -> list[float]:
    return [b - a for answer in load.answers for a, b in zip(answer.events, answer.events[1:])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mote", type=Path, default=Path("target/release/mote"))
    parser.add_argument("--model")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a streamed answer")
    parser.add_argument("--requests", type=int, default=6, help="requests of a client in a round, one after another")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="steps of the job that are timed, at least")
    parser.add_argument("--seconds", type=float, default=15, help="for so long, at least")
    parser.add_argument("--flags", default="", help="more flags of mote serve")
    args = parser.parse_args()
    texts = prompts.short(5, args.clients * args.requests)

    def body(n: int) -> dict:
        sampled = {"temperature": 1.0, "seed": n} if n % 2 else {"temperature": 0}
        return {"prompt": texts[n], "max_tokens": args.tokens, "ignore_eos": True, "stream": True, **sampled}

    with tempfile.TemporaryDirectory() as folder:
        mote = Mote(args.mote, args.model, Path(folder), args.flags.split())
        model = mote.get("/v1/models")["data"][0]["id"]

        def work() -> list[list[bytes]]:
            of = lambda n: client.request("/v1/completions", {"model": model, "stream_options": {"include_usage": True}, **body(n)})  # noqa: E731
            return [[of(c * args.requests + r) for r in range(args.requests)] for c in range(args.clients)]

        rounds = []
        try:
            client.load(mote.port, work(), stream=True)
            for number in range(args.rounds):
                found = {}
                load = client.load(mote.port, work(), stream=True)
                found["alone"] = gaps(load)
                id = begin(mote, f"job-{number}")
                found["steps_alone"], _ = steps_in(mote, id, args.seconds, args.steps)
                loads: list[client.Load] = []
                stop = threading.Event()

                def serve() -> None:
                    while not stop.is_set():
                        loads.append(client.load(mote.port, work(), stream=True))

                thread = threading.Thread(target=serve)
                thread.start()
                time.sleep(1)
                found["steps_beside"], spent = steps_in(mote, id, args.seconds, args.steps)
                stop.set()
                thread.join()
                end(mote, id)
                found["same"] = bool(loads) and texts_of(loads) == texts_of([load])
                found["beside"] = [gap for load in loads for gap in gaps(load)]
                busy = sum(spent[name] for name in ("receive", "schedule", "build", "forward", "sample", "commit", "wake", "gradient"))
                found["clients_share"] = spent["interactive"] / busy
                rounds.append(found)
                print(line(found), flush=True)
        finally:
            mote.server.stop()
    report(args, rounds)


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def figures(found: dict) -> dict:
    alone, beside = found["alone"], found["beside"]
    kept = found["steps_beside"] / found["steps_alone"]
    return {
        "p50_alone_ms": 1e3 * quantile(alone, 0.5),
        "p99_alone_ms": 1e3 * quantile(alone, 0.99),
        "p50_beside_ms": 1e3 * quantile(beside, 0.5),
        "p99_beside_ms": 1e3 * quantile(beside, 0.99),
        "p99_ratio": quantile(beside, 0.99) / quantile(alone, 0.99),
        "job_steps_per_second_alone": found["steps_alone"],
        "job_steps_per_second_beside": found["steps_beside"],
        "job_kept": kept,
        "clients_share": found["clients_share"],
        "job_kept_of_what_is_left": kept / (1 - found["clients_share"]),
        "same_texts": found["same"],
    }


def line(found: dict) -> str:
    it = figures(found)
    return (
        f"between tokens p50/p99 {it['p50_alone_ms']:.1f}/{it['p99_alone_ms']:.1f} ms alone, {it['p50_beside_ms']:.1f}/{it['p99_beside_ms']:.1f} beside the job: {it['p99_ratio']:.2f} times; "
        f"job {it['job_steps_per_second_alone']:.3f} steps/s alone, {it['job_steps_per_second_beside']:.3f} beside: {it['job_kept']:.2f}, clients' share {it['clients_share']:.2f}, "
        f"so {it['job_kept_of_what_is_left']:.2f} of what is left; texts {'the same' if it['same_texts'] else 'DIFFER'}"
    )


def report(args, rounds: list[dict]) -> None:
    all_figures = [figures(found) for found in rounds]
    medians = {name: statistics.median(it[name] for it in all_figures) for name in all_figures[0] if name != "same_texts"}
    print("medians: " + ", ".join(f"{name} {value:.3g}" for name, value in medians.items()))
    if args.out:
        facts = {"machine": machine.describe(), "clients": args.clients, "tokens": args.tokens, "rounds": all_figures, "medians": medians}
        args.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
