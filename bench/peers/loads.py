"""What is measured over HTTP: each function returns the cases of one group for `rounds.interleave`.

Keys are `group/server/kind`; the report looks them up by these names.
"""

import itertools
import statistics

from . import client, prompts
from .rounds import Case
from .servers import MoteServer, Server

TOKENS = 32
KINDS = ("base", "one", "own")  # no adapter; all clients one adapter; each client its own


def _adapter(kind: str, number: int) -> int | None:
    return {"base": None, "one": 0, "own": number}[kind]


def kinds(server) -> tuple[str, ...]:
    """The kinds of load that a server or worker takes: without adapters only the base.

    llama-server's base is measured on a server without adapters: loaded ones, even at scale 0, are part of every graph it runs, which made
    its base 7 times slower.
    """
    if not server.adapters:
        return ("base",)
    return tuple(kind for kind in KINDS if kind != "base") if server.base_apart else KINDS


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def seed(group: str, number: int, key: str = "") -> int:
    """The same prompts for every case of a round, others in every round and group."""
    return sum(map(ord, group + key)) * 1000 + number


def served(server: Server, clients: int, kind: str, per_client: int) -> Case:
    """Completion tokens a second: `clients` at once, about 21 prompt tokens in, exactly 32 out, answers not streamed."""
    group = f"served{clients}"

    def run(number: int) -> tuple[float, dict]:
        texts = iter(prompts.short(seed(group, number), clients * per_client))
        work = [[server.completion(next(texts), TOKENS, _adapter(kind, i)) for _ in range(per_client)] for i in range(clients)]
        with server:
            load = client.load(server.port, work, expect=TOKENS)
        waits = [a.done - a.sent for a in load.answers]
        return load.rate, {"wall_s": load.wall, "prompt_tokens": load.prompt_tokens, "request_p50_s": statistics.median(waits)}

    return Case(f"{group}/{server.name}/{kind}", run, [server.pid])


def resident(server: MoteServer, clients: int, per_client: int) -> Case:
    """`served` with each client its own adapter, picked from all over those resident."""
    spread = max(1, server.adapters // clients)

    def run(number: int) -> tuple[float, dict]:
        texts = iter(prompts.short(seed("resident", number), clients * per_client))
        own = [(i * spread + number) % server.adapters for i in range(clients)]
        work = [[server.completion(next(texts), TOKENS, adapter) for _ in range(per_client)] for adapter in own]
        with server:
            load = client.load(server.port, work, expect=TOKENS)
        return load.rate, {"distinct_adapters": len(set(own))}

    return Case(f"resident/{server.name}/own", run, [server.pid])


def warm_up(server: Server, clients: int) -> None:
    """A burst that is not counted: first use of buffers, of threads, of every adapter."""
    for kind in kinds(server):
        texts = prompts.short(seed("warm", 0, kind), clients)
        work = [[server.completion(text, 4, _adapter(kind, i))] for i, text in enumerate(texts)]
        with server:
            client.load(server.port, work, expect=4)


def latency(server: Server, clients: int, kind: str) -> Case:
    """Tokens a second of the same load streamed; details hold time to first token and between tokens (p50, p99, ms)."""
    group = f"streamed{clients}"

    def run(number: int) -> tuple[float, dict]:
        texts = prompts.short(seed(group, number), clients)
        work = [[server.completion(text, TOKENS, _adapter(kind, i), stream=True)] for i, text in enumerate(texts)]
        with server:
            load = client.load(server.port, work, stream=True, expect=TOKENS)
        first = [(a.events[0] - a.sent) * 1e3 for a in load.answers]
        gaps = [(b - a) * 1e3 for answer in load.answers for a, b in zip(answer.events, answer.events[1:])]
        figures = {"first": first, "between": gaps}
        return load.rate, {f"{k}_ms_p{int(q * 100)}": _quantile(v, q) for k, v in figures.items() for q in (0.5, 0.99)}

    return Case(f"{group}/{server.name}/{kind}", run, [server.pid])


def single_stream(server: Server, tokens: int = 128) -> Case:
    """Decode speed of one client: tokens after the first over the time between first and last."""

    def run(number: int) -> tuple[float, dict]:
        (text,) = prompts.short(seed("stream1", number), 1)
        with server:
            load = client.load(server.port, [[server.completion(text, tokens, stream=True)]], stream=True, expect=tokens)
        (answer,) = load.answers
        return (tokens - 1) / (answer.events[-1] - answer.events[0]), {"first_ms": (answer.events[0] - answer.sent) * 1e3}

    return Case(f"decode1/{server.name}/http", run, [server.pid])


def prefill(server: Server, tokens: int = 512) -> Case:
    """Prompt tokens a second of one prompt, by the time of a request for one token: HTTP and JSON are in it."""

    def run(number: int) -> tuple[float, dict]:
        (ids,) = prompts.long(seed("pp", number), 1, tokens)
        with server:
            load = client.load(server.port, [[server.completion(ids, 1)]], expect=1)
        if load.prompt_tokens != tokens:
            raise client.LoadError(f"the prompt counted {load.prompt_tokens} tokens, not {tokens}")
        return tokens / load.wall, {}

    return Case(f"pp{tokens}/{server.name}/http", run, [server.pid])


def at_context(server: Server, clients: int = 32, context: int = 512, tokens: int = 224) -> Case:
    """Decode speed of `clients` sequences whose context is `context` and more.

    Counted between the moment the last of them has its first token and the moment the first is done, so that all decode and
    none is prefilling. `tokens` is long enough for that moment to come: earlier sequences decode during the others' prefill.
    """

    def run(number: int) -> tuple[float, dict]:
        work = [[server.completion(ids, tokens, stream=True)] for ids in prompts.long(seed("ctx", number), clients, context)]
        with server:
            load = client.load(server.port, work, stream=True, expect=tokens)
        begin, end = max(a.events[0] for a in load.answers), min(a.events[-1] for a in load.answers)
        # An event can hold two tokens (half a character waits for its other half): scale events to tokens.
        counted = sum(sum(begin < t <= end for t in a.events) * tokens / len(a.events) for a in load.answers)
        if end - begin < 0.2 or counted < 8 * clients:
            raise client.LoadError("the sequences did not decode together for long enough")
        return counted / (end - begin), {"window_s": end - begin, "steps": counted / clients}

    return Case(f"context{context}/{server.name}/http", run, [server.pid])


def first_token(server: MoteServer, count: int, scale: float) -> list[Case]:
    """Milliseconds that the first token comes later under an adapter uploaded just before than for the base; medians of `count`."""
    fresh_names = itertools.count(9_000_000_000)  # a measurement may be taken again: never the same name

    def once(fresh: bool) -> float:
        adapter = next(fresh_names)
        (text,) = prompts.short(seed("first", adapter), 1)
        if fresh:
            server.upload_singly(adapter, 1, scale)
        work = [[server.completion(text, 2, adapter if fresh else None, stream=True)]]
        (answer,) = client.load(server.port, work, stream=True, expect=2).answers
        return (answer.events[0] - answer.sent) * 1e3

    def run(_: int) -> tuple[float, dict]:
        times: dict[bool, list[float]] = {False: [], True: []}
        with server:
            once(True)  # not counted
            for i in range(count):
                for fresh in (bool(i % 2), not i % 2):
                    times[fresh].append(once(fresh))
        figures = {f"{name}_ms_p{int(q * 100)}": _quantile(times[fresh], q) for name, fresh in (("base", False), ("fresh", True)) for q in (0.5, 0.9)}
        return statistics.median(times[True]) - statistics.median(times[False]), figures

    return [Case(f"first/{server.name}/extra_ms", run, [server.pid])]


def uploads(server: MoteServer, singles: int, batch: int, scale: float) -> list[Case]:
    """Uploads a second: one connection, a request each; and the batch route. Durable when acknowledged."""
    names = itertools.count(1_000_000, max(singles, batch))

    def one(_: int) -> tuple[float, dict]:
        with server:
            return singles / server.upload_singly(next(names), singles, scale), {}

    def many(_: int) -> tuple[float, dict]:
        with server:
            return batch / server.upload_batch(next(names), batch, scale), {}

    return [Case(f"upload/{server.name}/single", one, [server.pid]), Case(f"upload/{server.name}/batch", many, [server.pid])]
