#!/usr/bin/env python3
"""The same load against several builds of Mote, or one with several flags, in turn.

    python3 bench/turns.py --model FILE --server 'target/release/mote --log off' --server 'target/release/mote' --server 'target/release/mote --otlp-endpoint http://127.0.0.1:{collector}'

Each `--server` is a program and more flags of `mote serve`; `{collector}` is the port of a collector that takes every span and keeps none. All servers stay loaded, and those that are not measured are
stopped (SIGSTOP). A round measures each once, in an order that turns, forwards and backwards: `--clients` clients, each under its own adapter, `--per-client` requests of `--tokens` tokens one after another, no two prompts
alike. It prints each server's rate, and the median of its ratios to the first within rounds with their quartiles and a 95 % interval by resampling.
"""

import argparse
import json
import random
import shlex
import statistics
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from peers import client, machine, prompts, rounds, servers  # noqa: E402


class Collector(BaseHTTPRequestHandler):
    """Takes whatever is posted. `taken` counts the bytes."""

    taken = 0
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:  # noqa: N802 (the library's name)
        Collector.taken += len(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_) -> None:
        """Says nothing."""


def interval(ratios: list[float]) -> tuple[float, float]:
    """95 % of the medians of resampled ratios."""
    r = random.Random(1)
    medians = sorted(statistics.median(r.choices(ratios, k=len(ratios))) for _ in range(4000))
    return medians[100], medians[-101]


def start(args, line: str, at: Path) -> servers.MoteServer:
    """A server that has its adapters, asleep."""
    program, *flags = shlex.split(line)
    server = servers.MoteServer(line, Path(program), args.model, flags, args.clients, args.threads, at, at.with_suffix(".log"))
    server.start()
    with server:
        server.upload_batch(0, args.clients, 1e-3)
    return server


def measure(args, running: list[servers.MoteServer]) -> list[list[float]]:
    """Tokens a second of each server in each round, after a load that is not counted."""
    texts = iter(prompts.short(11, (args.rounds + 1) * len(running) * args.clients * args.per_client))
    options = {"stream": True, "stream_options": {"include_usage": True}} if args.streamed else {}

    def load(server) -> float:
        def request(adapter: int) -> bytes:
            body = {"prompt": next(texts), "max_tokens": args.tokens, "temperature": 0, "ignore_eos": True}
            return client.request("/v1/completions", body | options | server.extras(adapter))

        work = [[request(adapter) for _ in range(args.per_client)] for adapter in range(args.clients)]
        with server:
            return client.load(server.port, work, stream=args.streamed, expect=args.tokens).rate

    for server in running:
        load(server)
    rates = [[] for _ in running]
    for number in range(args.rounds):
        for place in rounds.in_turn(list(range(len(running))), number):
            rates[place].append(load(running[place]))
    return rates


def compare(names: list[str], rates: list[list[float]]) -> list[dict]:
    """Prints and gives each server's rate and its ratios to the first."""
    table = []
    for name, values in zip(names, rates):
        ratios = [value / base for value, base in zip(values, rates[0])]
        low, _, high = statistics.quantiles(ratios, n=4)
        it = {"server": name, "tokens_a_second": statistics.median(values), "ratio": statistics.median(ratios), "quartiles": [low, high], "interval": interval(ratios)}
        print(f"{it['tokens_a_second']:8.1f} tokens/s  {it['ratio']:.3f} (quartiles {low:.3f} to {high:.3f}, 95 % {it['interval'][0]:.3f} to {it['interval'][1]:.3f})  {name}")
        table.append(it)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--server", action="append", required=True)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--per-client", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--streamed", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2")
    with tempfile.TemporaryDirectory() as folder, ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        running = []
        try:
            for number, line in enumerate(args.server):
                running.append(start(args, line.replace("{collector}", str(collector.server_port)), Path(folder) / str(number)))
            rates = measure(args, running)
        finally:
            for server in running:
                server.stop()
            collector.shutdown()
    table = compare(args.server, rates)
    print(f"{Collector.taken} bytes of spans")
    if args.out:
        args.out.write_text(json.dumps({"machine": machine.describe(), "settings": {"clients": args.clients, "tokens": args.tokens, "streamed": args.streamed}, "rates": rates, "table": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
