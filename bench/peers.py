#!/usr/bin/env python3
"""Runs one load against our server and its peers, interleaved, and prints the targets table. See bench/README.md.

    python3 bench/peers.py --mote target/release/mote --model SmolLM2-135M-Instruct.Q4_1.gguf --out bench/results/run.json
"""

import argparse
import contextlib
import datetime
import os
import shlex
import signal
import sys
from pathlib import Path

from peers import client, formats, install, loads, machine, quality, report, tools, workers
from peers.rounds import Results, interleave
from peers.servers import LlamaServer, MoteServer, Server

REPOSITORY = Path(__file__).resolve().parent.parent
PARTS = ("served", "streamed", "forward", "context", "resident", "upload", "first", "quality")
PEERS = ("mote", "llama", "torch", "mistral")


def arguments() -> argparse.Namespace:
    """The flags."""
    names = lambda text: [part for part in text.split(",") if part]  # noqa: E731
    numbers = lambda text: [int(part) for part in names(text)]  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--mote", type=Path, default=REPOSITORY / "target/release/mote", help="our binary; measure a release build")
    add("--model", type=Path, required=True, help="the GGUF file all of them serve (requantised for peers)")
    add("--only", type=names, default=list(PEERS), metavar="PEER,..", help=f"of {','.join(PEERS)}")
    add("--parts", type=names, default=list(PARTS), metavar="PART,..", help=f"of {','.join(PARTS)}")
    add("--formats", type=names, default=["Q4_0", "Q8_0", "BF16"], metavar="F,..", help="llama.cpp formats to measure")
    add("--out", type=Path, help="JSON of everything; a .md beside it")
    add("--rounds", type=int, default=5, help="rounds of each case; medians count")
    add("--clients", type=numbers, default=[32, 64], metavar="N,..", help="clients at once in the served loads")
    add("--per-client", type=int, default=2, help="requests of a client, one after another, in a round")
    add("--resident", type=numbers, default=[1, 1000, 1_000_000], metavar="N,..", help="adapters resident, a server each")
    add("--scale", type=float, default=0.05, help="adapters' numbers are uniform within plus and minus this")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of each server")
    add("--mote-flags", type=shlex.split, default=[], metavar="'..'", help="more flags of `mote serve` and `mote bench`, e.g. '--dtype q8'")
    add("--mote-decode-flags", type=shlex.split, metavar="'..'", help="flags of a second variant of ours for batch 1, e.g. '--dtype q4'")
    add("--lora-dtype", choices=("f16", "f32"), default="f16", help="dtype of llama.cpp's LoRA files")
    add("--wait-idle", type=float, default=30, metavar="S", help="wait so long for an idle machine before each measurement")
    add("--tries", type=int, default=3, help="a measurement that others disturbed is taken again, at most so often")
    add("--work", type=Path, default=REPOSITORY / "target/bench", help="builds, formats, logs, data folders")
    add("--venv", type=Path, default=REPOSITORY / "target/bench-venv", help="where the peers' packages are installed")
    add("--llama-bin", type=Path, help="a folder with llama.cpp's tools, instead of building them")
    add("--torch-python", type=Path, help="a Python with torch, transformers and peft, instead of installing them")
    add("--text", type=Path, help="held-out UTF-8 text for the part `quality`")
    add("--text-from-gsm8k", type=Path, metavar="JSONL", help="make that text of the questions and answers of this file")
    add("--ids", type=Path, help="where the part `quality` writes the windows it scores [default: in --work]")
    args = parser.parse_args()
    for name, known in (("only", PEERS), ("parts", PARTS)):
        if unknown := set(getattr(args, name)) - set(known):
            parser.error(f"--{name}: no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if not args.model.is_file():
        parser.error(f"--model: {args.model} is not a file")
    if "mote" in args.only and not args.mote.is_file():
        parser.error(f"--mote: {args.mote} is not a file; cargo build --release makes it")
    return args


class Runner:
    """One run: what is installed, what was measured."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.results, self.watch = args, Results(), machine.Watch(args.wait_idle, args.tries)
        self.logs = args.work / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.llama: install.LlamaCpp | None = None
        self.formats: dict[str, Path] = {}
        self.loras: list[Path] = []
        self.workers: list[workers.Worker] = []

    def prepare(self) -> None:
        """Installs the peers that were asked for; one that cannot be had is named and left out."""
        args, venv = self.args, install.Venv(self.args.venv, self.logs)
        if not venv.has("gguf"):
            venv.install("gguf")
        shape = formats.shape(venv.python, args.model, args.work / "shape.json")
        if "llama" in args.only:
            with self.leaving_out("llama"):
                self.llama = install.llama_cpp(venv, args.work, args.llama_bin)
                wanted = args.formats + ["F32"] * ("quality" in args.parts)
                self.formats = formats.requantise(self.llama, args.model, wanted, args.work / "formats")
                self.loras = formats.lora_adapters(venv.python, args.model, max(args.clients, default=1), args.lora_dtype, args.work / "loras")
                self.results.facts["llama.cpp"] = self.llama.version
        adapters = min(args.clients, default=1)
        if "torch" in args.only:
            with self.leaving_out("torch"):
                python = install.torch_python(venv, args.torch_python)
                for dtype in ("bf16", "f32"):
                    self.workers.append(workers.Worker(f"PEFT {dtype}", python, ["torch", shape, dtype, args.threads], adapters, True, self.logs))
        if "mistral" in args.only:
            with self.leaving_out("mistral"):
                if "Q4_0" not in self.formats:
                    raise install.Missing("mistral.rs is measured on the Q4_0 file that llama-quantize makes: llama and Q4_0 are needed")
                python = install.mistralrs_python(venv)
                self.workers.append(workers.Worker("mistral.rs Q4_0", python, ["mistral", self.formats["Q4_0"], args.threads], 0, False, self.logs))

    @contextlib.contextmanager
    def leaving_out(self, peer: str):
        """A failure inside is a peer left out, with its reason in the report."""
        try:
            yield
        except (install.Missing, client.LoadError, RuntimeError, OSError) as error:
            self.results.failures[peer] = str(error)
            print(f"!! {peer} is left out: {error}", flush=True)

    # Servers

    def llama_servers(self, clients: int, context: int = 256) -> list[LlamaServer]:
        """Two llama-servers for each format, with as many slots as clients: one for the base alone, one with a LoRA for each client."""
        made = []
        for fmt in self.args.formats if self.llama else []:
            for loras in ([], self.loras[:clients]):
                log = self.logs / f"llama-server-{fmt}-{clients}-{len(loras)}.log"
                made.append(LlamaServer(self.llama, fmt, self.formats[fmt], loras, clients, context, self.args.threads, log))
        return made

    def mote_server(self, name: str = "mote", flags: tuple[str, ...] = (), adapters: int = 0) -> MoteServer:
        """One of our servers; `adapters` are uploaded once it runs."""
        args, folder = self.args, name.replace(" ", "-")
        all_flags = [*args.mote_flags, *flags]
        return MoteServer(name, args.mote, args.model, all_flags, adapters, args.threads, args.work / "data" / folder, self.logs / f"{folder}.log")

    @contextlib.contextmanager
    def running(self, servers: list[Server]):
        """Starts all, uploads ours' adapters; notes memory and ends them all at the end. One that does not start is left out."""
        alive = []
        try:
            for server in servers:
                with self.leaving_out(server.name):
                    server.start()
                    if isinstance(server, MoteServer) and server.adapters:
                        with server:
                            server.upload_batch(0, server.adapters, self.args.scale)
                    alive.append(server)
            yield alive
            for server in alive:
                memory = machine.memory_mb(server.pid)
                kept = self.results.facts.setdefault("memory", {})
                if memory["peak_mb"] > kept.get(server.name, {}).get("peak_mb", 0):
                    kept[server.name] = {"at_start_mb": server.memory_at_start["resident_mb"], "peak_mb": memory["peak_mb"]}
        finally:
            for server in servers:
                server.stop()

    def measure(self, group: str, cases: list, rounds: int | None = None) -> None:
        """Interleaves the cases and saves what is known so far, so that an interrupted run loses nothing."""
        interleave(group, cases, rounds or self.args.rounds, self.watch, self.results)
        self.save()

    # Parts

    def served(self) -> None:
        """Loads (a): base, one adapter for all, each its own, at each number of clients."""
        ours = "mote" in self.args.only
        for clients in self.args.clients:
            servers = [self.mote_server(adapters=clients)] if ours else []
            if ours and clients == min(self.args.clients):
                servers.append(self.mote_server("mote rank 0", ("--rank", "0")))
            with self.running([*servers, *self.llama_servers(clients)]) as alive:
                for server in alive:
                    loads.warm_up(server, clients)
                if "served" in self.args.parts:
                    cases = [loads.served(s, clients, kind, self.args.per_client) for s in alive for kind in loads.kinds(s)]
                    if clients == min(self.args.clients):
                        cases += [worker.served(clients, kind) for worker in self.workers if worker.batched for kind in loads.kinds(worker)]
                    self.measure(f"served, {clients} clients", cases)
                if "streamed" in self.args.parts:
                    cases = [loads.latency(s, clients, kind) for s in alive for kind in loads.kinds(s) if kind != "one"]
                    self.measure(f"streamed, {clients} clients", cases, max(1, self.args.rounds // 2))

    def forward(self) -> None:
        """Loads (b): batch-1 decode and prefill, with the tools and over HTTP; batch 32 at context 512."""
        args = self.args
        servers: list[Server] = [server for server in self.llama_servers(1, 1024) if not server.adapters]
        variants = [("mote", [])] + ([("mote fast", args.mote_decode_flags)] if args.mote_decode_flags else [])
        if "mote" in args.only:
            servers += [self.mote_server(name, tuple(flags)) for name, flags in variants]
        cases = []
        if "mote" in args.only and tools.has_mote_bench(args.mote):
            for name, flags in variants:
                cases += tools.mote_bench(args.mote, args.model, name, [*args.mote_flags, *flags], args.threads, args.work)
        for fmt in args.formats if self.llama else []:
            cases += tools.llama_bench(self.llama, fmt, self.formats[fmt], args.threads)
            cases += [tools.llama_batched(self.llama, fmt, self.formats[fmt], args.threads)]
        for worker in self.workers:
            cases += worker.forward()
        with self.running(servers) as alive:
            for server in alive:
                cases += [loads.single_stream(server), loads.prefill(server)]
                cases += [loads.at_context(server)] if isinstance(server, MoteServer) else []
            cases = [case for case in cases if ("context" if case.key.startswith("context") else "forward") in args.parts]
            self.measure("forward pass", cases)

    def resident(self) -> None:
        """The same load with 1, 1,000 and 1,000,000 adapters resident, a server each; the memory they take."""
        clients = min(self.args.clients)
        servers = [self.mote_server(f"mote {count}", adapters=count) for count in self.args.resident]
        with self.running(servers) as alive:
            for server in alive:
                memory = machine.memory_mb(server.pid)
                grown = (memory["resident_mb"] - server.memory_at_start["resident_mb"]) * 2**20 / 1e6
                key = f"memory/{server.name}/mb"
                self.results.values[key], self.results.details[key] = [grown], [{"foreign_cpu": 0, "stolen_cpu": 0}]
            cases = [loads.resident(server, clients, self.args.per_client) for server in alive]
            self.measure("adapters resident", cases)

    def uploads(self) -> None:
        """Rates of uploading, and the first token under an adapter uploaded just before."""
        with self.running([self.mote_server()]) as alive:
            for server in alive:
                loads.warm_up(server, 1)
                if "first" in self.args.parts:
                    self.measure("first token", loads.first_token(server, 25, self.args.scale))
                if "upload" in self.args.parts:
                    self.measure("uploads", loads.uploads(server, 2000, 100_000, self.args.scale), min(3, self.args.rounds))

    def run(self) -> None:
        """The parts that were asked for, in order."""
        args, parts = self.args, set(self.args.parts)
        self.results.facts["machine"] = machine.describe()
        self.prepare()
        try:
            for worker in self.workers:
                with self.leaving_out(worker.name):
                    worker.start()
            self.workers = [worker for worker in self.workers if worker.alive]
            if "quality" in parts and self.llama:
                with self.leaving_out("quality"):
                    self.results.facts["quality"] = quality.llama(self.llama, self.formats, args.formats, args.text, args.text_from_gsm8k, args.ids, args.work)
            if parts & {"served", "streamed"}:
                self.served()
            if parts & {"forward", "context"}:
                self.forward()
            if "mote" in args.only and "resident" in parts:
                self.resident()
            if "mote" in args.only and parts & {"upload", "first"}:
                self.uploads()
        finally:
            for worker in self.workers:
                if memory := worker.stop():
                    self.results.facts.setdefault("memory", {})[worker.name] = memory
        self.save()
        print("\n" + report.markdown(self.results, self.watch.warnings))

    def save(self) -> None:
        """Writes --out, if it was given."""
        if self.args.out:
            settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(self.args).items()}
            settings |= {"command": shlex.join(sys.argv), "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
            # Published: without the folders of whoever ran it.
            for folder in [Path.cwd(), self.args.model.absolute().parent]:
                settings = {key: value.replace(f"{folder}/", "") if isinstance(value, str) else value for key, value in settings.items()}
            report.write(self.results, self.watch.warnings, settings, self.args.out)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # so that the servers are ended too
    Runner(arguments()).run()
