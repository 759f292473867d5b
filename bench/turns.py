#!/usr/bin/env python3
"""The same load against several builds of Mote, or one with several flags, in turn.

    python3 bench/turns.py --model FILE --server 'target/release/mote --log off' --server 'target/release/mote' --server 'target/release/mote --otlp-endpoint http://127.0.0.1:{collector}'

Each `--server` is a program and more flags of `mote serve`; `{collector}` is the port of a collector that takes every span and keeps none. All servers stay loaded, and those that are not measured are
stopped (SIGSTOP). A round measures each once, in an order that turns: `--clients` clients, each under its own adapter, `--per-client` requests of `--tokens` tokens one after another, no two prompts
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
from peers import client, machine, prompts, servers  # noqa: E402


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
    texts = iter(prompts.short(11, (args.rounds + 1) * len(args.server) * args.clients * args.per_client))
    with tempfile.TemporaryDirectory() as folder, ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        running = []
        try:
            for number, line in enumerate(args.server):
                program, *flags = shlex.split(line.replace("{collector}", str(collector.server_port)))
                at = Path(folder) / str(number)
                server = servers.MoteServer(line, Path(program), args.model, flags, args.clients, args.threads, at, at.with_suffix(".log"))
                server.start()
                running.append(server)
                with server:
                    server.upload_batch(0, args.clients, 1e-3)

            def load(server) -> float:
                def request(adapter: int) -> bytes:
                    body = {"prompt": next(texts), "max_tokens": args.tokens, "temperature": 0, "ignore_eos": True, "stream": args.streamed} | server.extras(adapter)
                    return client.request("/v1/completions", body | ({"stream_options": {"include_usage": True}} if args.streamed else {}))

                work = [[request(adapter) for _ in range(args.per_client)] for adapter in range(args.clients)]
                with server:
                    return client.load(server.port, work, stream=args.streamed, expect=args.tokens).rate

            for server in running:
                load(server)
            rates: dict[str, list[float]] = {server.name: [] for server in running}
            for number in range(args.rounds):
                for place in range(len(running)):
                    server = running[(number + place) % len(running)]
                    rates[server.name].append(load(server))
        finally:
            for server in running:
                server.stop()
            collector.shutdown()
    first = rates[args.server[0]]
    table = {}
    for name, values in rates.items():
        ratios = [value / base for value, base in zip(values, first)]
        quartiles = statistics.quantiles(ratios, n=4)
        table[name] = {"tokens_a_second": statistics.median(values), "ratio": statistics.median(ratios), "quartiles": [quartiles[0], quartiles[2]], "interval": interval(ratios)}
        it = table[name]
        print(f"{it['tokens_a_second']:8.1f} tokens/s  {it['ratio']:.3f} (quartiles {it['quartiles'][0]:.3f} to {it['quartiles'][1]:.3f}, 95 % {it['interval'][0]:.3f} to {it['interval'][1]:.3f})  {name}")
    print(f"{Collector.taken} bytes of spans")
    if args.out:
        args.out.write_text(json.dumps({"machine": machine.describe(), "settings": {"clients": args.clients, "tokens": args.tokens, "streamed": args.streamed}, "rates": rates, "table": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
