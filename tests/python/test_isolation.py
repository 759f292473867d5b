"""Tenants on one server: no answer reflects another's adapters, cache, names or existence.

MOTE_ISOLATION_SECONDS is how long the random part runs (rounds of a few seconds, each with new tenants), MOTE_ISOLATION_SEED what it begins with. A failure prints the
seed, and for each wrong answer the few requests that show it.
"""

import copy
import dataclasses
import json
import os
import pathlib
import shutil
import threading
import time

import pytest
from conftest import ADMIN_KEY, GOLDEN, Server
from isolation import BASE, BLOCK, NAMES, QUESTIONS, Api, Oracle, Question, Worker, World, encoded, inline, new_tenant, numbers, said
from isolation_checker import Checker
from isolation_routes import Ann, as_seen, body_of, filled, operations, questions_about

SECONDS = float(os.environ.get("MOTE_ISOLATION_SECONDS", "3"))
SEED = os.environ.get("MOTE_ISOLATION_SEED") or str(time.time_ns() % 1_000_000)
ROUND = 3.0  # seconds
LEAST = 50  # requests of a worker in a round, however long they take
TENANTS, WORKERS = 4, 3
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The golden model with a chat template."""
    folder = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(GOLDEN / "llama/model", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def serve(model: pathlib.Path, *args: str):
    server = Server("--model", str(model), "--model-id", BASE, "--dtype", "f32", "--shed-after-s", "0", *args)
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def crowd(model):
    yield from serve(model)


@pytest.fixture(scope="module")
def empty(model):
    """The same server without the others."""
    yield from serve(model)


@pytest.fixture(scope="module")
def oracle(model):
    for server in serve(model, "--no-auth", "--no-prefix-cache", "--max-batch", "1"):
        yield Oracle(server.url)


def gauges(server) -> dict:
    """The metrics without labels of histograms, as numbers."""
    text = Api(server.url, ADMIN_KEY).call("GET", "/metrics").body.decode()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if not line.startswith("#")}


def is_idle(now: dict) -> bool:
    return now["mote_engine_running"] == now["mote_engine_queue"] == now['mote_engine_kv_blocks{state="used"}'] == 0


def idle(server) -> dict:
    """The metrics when nothing runs any more: no sequence, and no block in anybody's hands."""
    deadline = time.monotonic() + 20
    while not is_idle(now := gauges(server)):
        assert time.monotonic() < deadline, {name: value for name, value in now.items() if name.startswith("mote_engine")}
        time.sleep(0.05)
    return now


def run_round(server, oracle, seed, seconds: float) -> tuple[World, list]:
    """A round's world and its events, with a last look at each tenant's usage when all is quiet."""
    world = World(server.url, ADMIN_KEY, oracle, seed, TENANTS)
    workers = [Worker(world, tenant, number) for tenant in world.tenants for number in range(WORKERS if tenant.number else 1)]
    until, broken = time.monotonic() + seconds, []

    def run(worker):
        try:
            worker.run(until, LEAST)
        except Exception as error:
            broken.append(error)

    threads = [threading.Thread(target=run, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if broken:
        raise broken[0]
    idle(server)
    for tenant in world.tenants:
        team = [worker for worker in workers if worker.me is tenant]
        team[0].last_usage(team)
    for name in NAMES:
        workers[0].api.call("DELETE", f"/adapters/{name}")
    return world, [event for worker in workers for event in worker.events]


@pytest.fixture(scope="module")
def rounds(crowd, oracle):
    """Rounds for as long as there is time: the first one's events, and what was wrong in all."""
    began, number, wrong, first = time.monotonic(), 0, [], None
    while number == 0 or time.monotonic() - began < SECONDS:
        seed = f"{SEED}/{number}"
        world, events = run_round(crowd, oracle, seed, min(ROUND, SECONDS))
        found = Checker(world, events).violations()
        wrong += [f"MOTE_ISOLATION_SEED={SEED}, round {number}: {violation}" for violation in found]
        first = first or (world, events)
        number += 1
        print(f"seed {seed}: {len(events)} requests, {len(found)} wrong answers")
        if wrong:
            break
    return first, wrong


def test_random_interleavings(rounds):
    (_, events), wrong = rounds
    assert not wrong, f"{len(wrong)} wrong answers\n" + "\n".join(wrong[:5])
    done = {(event.what, event.answer.status) for event in events}
    for what, status in [("upload", 201), ("upload", 409), ("replace", 200), ("replace", 404), ("delete", 204), ("rollback", 200), ("rollback", 404), ("batch", 200),
                         ("once", 201), ("complete", 200), ("complete", 404), ("weights", 200), ("file", 200), ("snoop", 404), ("usage", 200)]:
        assert (what, status) in done, f"{what} was never answered {status}"
    asked = [event for event in events if event.what == "complete" and event.answer.status == 200]
    usages = [usage for event in asked if (usage := said(event.answer).usage)]
    assert any(event.answer.cut for event in asked) and any(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    assert {event.tenant for event in asked} == set(range(TENANTS + 1))


def completions(events, **facts):
    return [event for event in events if event.what == "complete" and event.answer.status == 200 and not event.answer.cut
            and b"data: " not in event.answer.body and all(getattr(event, name) == value for name, value in facts.items())]


def doctored_answer(events, world):
    """Another tenant's answer to the same question."""
    for event in completions(events):
        for other in completions(events, question=event.question, scale=event.scale):
            generation = other.answer.headers.get("x-adapter-generation")
            if other.tenant not in (0, event.tenant) and event.name and world.data_of.get(generation) in world.tenants[other.tenant].private:
                event.answer.body, event.answer.headers = other.answer.body, other.answer.headers
                return "this was said under the numbers of"


def doctored_header(events, world):
    """The right answer under another's generation."""
    event = completions(events, tenant=1, name=NAMES[0])[0]
    event.answer.headers["x-adapter-generation"] = world.oracle.generation(world.tenants[2].private[0])
    return "is not that of what answered"


def doctored_cache(events, _world):
    """A hit on a tenant's first use of an adapter."""
    asked = [event for event in events if event.what == "complete" and event.answer.status == 200]

    def under(event):
        return event.tenant, event.scale, event.answer.headers.get("x-adapter-generation")

    for event in completions(events):
        if all(under(other) != under(event) or other.answer.begin >= event.answer.end for other in asked if other is not event):
            body = event.answer.json()
            body["usage"]["prompt_tokens_details"]["cached_tokens"] = BLOCK
            event.answer.body = json.dumps(body).encode()
            return f"{BLOCK} cached tokens, where this tenant itself had left at most 0"


def doctored_usage(events, _world):
    """A request of another's on the bill."""
    event = [event for event in events if event.what == "last-usage" and event.tenant == 1][-1]
    body = event.answer.json()
    body["total"]["requests"] += 1
    event.answer.body = json.dumps(body).encode()
    return "requests, where this tenant used at most"


def doctored_text(events, world):
    """Another's file name in an error."""
    event = next(event for event in events if event.answer.status == 404 and event.tenant == 1)
    body = event.answer.json()
    body["error"]["message"] += f" Did you mean {world.tenants[2].marks['filename']}?"
    event.answer.body = json.dumps(body).encode()
    return "which is tenant 2's"


def doctored_id(events, _world):
    """An id that another was given."""
    upload, other = (next(event for event in events if event.what == "upload" and event.answer.status == 201 and event.tenant == tenant) for tenant in (1, 2))
    upload.answer.body = json.dumps(upload.answer.json() | {"id": other.answer.json()["id"]}).encode()
    return "was told"


def doctored_time(events, world):
    """A generation of the tenant's own that had been replaced."""
    checker = Checker(world, events)
    for event in events:
        if event.what == "get" and event.answer.status == 200 and event.tenant:
            written = {write.value for write in checker.registers[event.tenant, event.name].writes}
            for stale in written - checker.visible(event, event.name) - {None}:
                event.answer.body = json.dumps(event.answer.json() | {"generation": world.oracle.generation(stale)}).encode()
                return "an adapter's generation"


@pytest.mark.parametrize("doctor", [doctored_answer, doctored_header, doctored_cache, doctored_usage, doctored_text, doctored_id, doctored_time], ids=lambda d: d.__name__)
def test_the_checker_finds_what_is_wrong(rounds, doctor):
    """Each property can fail: one answer of a true run is changed."""
    (world, events), _ = rounds
    events = [dataclasses.replace(event, answer=copy.copy(event.answer), writes=dict(event.writes)) for event in events]
    for event in events:
        event.answer.headers = dict(event.answer.headers)
    words = doctor(events, world)
    assert words, "this run had nothing to change"
    found = Checker(world, events).violations()
    assert any(words in str(violation) for violation in found), [violation.what for violation in found]


def test_what_is_another_s_looks_like_what_is_nowhere(crowd, empty):
    """Bob asks a server on which ann has one of everything, and one that has never heard of her, the same: byte for byte he gets the same."""
    ann = Ann(crowd)
    here, there = (Api(server.url, new_tenant(server.url, ADMIN_KEY, "bob")) for server in (crowd, empty))
    statuses = set()
    for question in questions_about(ann.ids):
        one, other = as_seen(here.call(*question)), as_seen(there.call(*question))
        assert one == other, f"bob can tell by {question[:3]}"
        statuses.add(one[0])
        leaked = [id for id in ann.ids.values() if len(id) > 8 and id in one[2] and id not in json.dumps(question[:3], default=str)]
        assert not leaked, f"{question[:3]} answers with {leaked}"
    assert {200, 201, 204, 403, 404} <= statuses
    # All of it was there to be found: to its owner each of these routes answers otherwise, for at least one of the ids.
    for method, path in operations():
        if "{" in path:
            api = ann.admin if path.startswith("/admin") else ann.api
            got = {id: api.call(method, filled(path, id), *body_of(method, path, ann.ids)).status for id in ann.ids.values()}
            assert any(status not in (403, 404) for status in got.values()), f"nothing here is of the kind that {method} {path} takes: {got}"


def rows(server, api, path, body) -> tuple[int, int, int, int]:
    """Prompt tokens of a completion, cached ones among them, and what the engine counted: rows of prompts, and cached tokens."""
    before = idle(server)
    usage = api.call("POST", path, body).json()["usage"]
    after = idle(server)
    counted = [int(after[f"mote_engine_{name}_total"] - before[f"mote_engine_{name}_total"]) for name in ("prefill_tokens", "cached_tokens")]
    return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"], *counted


def test_hits_say_nothing_about_others(crowd):
    """The first use of a prompt computes all of it, whoever has run it before: there is nothing whose time could be taken. The second use is a hit."""
    ann, bob = (Api(crowd.url, new_tenant(crowd.url, ADMIN_KEY, f"{name}-of-the-cache")) for name in ("ann", "bob"))
    admin = Api(crowd.url, ADMIN_KEY)
    path, body = QUESTIONS[0].request()
    data, other = numbers("cache", 0), numbers("cache", 1)

    def put(api, name, data, **more):
        assert api.call("POST", "/adapters", {"name": name, "data": encoded(data), "on_conflict": "new_generation", **more}).status == 201

    def first(api, **model):
        prompt, cached, computed, hit = rows(crowd, api, path, body | model)
        assert (cached, computed, hit) == (0, prompt, 0), f"a first use of {model} had a hit: {cached} of {prompt} tokens"

    def second(api, **model):
        prompt, cached, computed, hit = rows(crowd, api, path, body | model)
        assert cached >= prompt - BLOCK - 1 and (computed, hit) == (prompt - cached, cached), f"a second use of {model} had {cached} of {prompt} tokens"

    for api in (ann, bob):
        put(api, "same", data)
        put(api, "twin", data)
    put(admin, "lent", numbers("cache", 2), public=True)
    for model in ({"model": BASE}, {"model": "same"}, {"model": inline(other)}, {"model": BASE, "adapter": {"name": "same", "scale": 0.5}}, {"model": "lent"}):
        for api in (ann, bob):
            first(api, **model)
            second(api, **model)
    second(ann, model="twin")  # The same numbers of the same tenant are the same cache under any name.
    put(ann, "same", numbers("cache", 3))
    first(ann, model="same")
    second(bob, model="same")
    second(ann, model="twin")
    # What is deleted is forgotten, for its owner alone.
    assert ann.call("DELETE", "/adapters/twin").status == 204
    put(ann, "twin", data)
    first(ann, model="twin")
    second(bob, model="same")
    put(admin, "lent", numbers("cache", 4), public=True)
    for api in (bob, ann):
        first(api, model="lent")
        second(api, model="lent")
    assert admin.call("DELETE", "/adapters/lent").status == 204
    assert bob.call("POST", path, body | {"model": "lent"}).status == 404


def test_a_cancelled_stream_leaves_nothing(crowd, oracle):
    """Long streams of some tenants are left after their first chunks while another one streams: it reads its own text to the end, and all blocks come back."""
    apis = [Api(crowd.url, new_tenant(crowd.url, ADMIN_KEY, f"stream-{number}")) for number in range(TENANTS)]
    long = Question(QUESTIONS[3].prompt, 120)
    path, body = long.request()
    before, wrong = idle(crowd), []

    def stream(api, number, leave_after, choices):
        for turn in range(2):
            data = numbers("stream", number, turn)
            answer = api.call("POST", path, body | {"model": inline(data), "stream": True, "n": choices}, leave_after=leave_after)
            if leave_after is None and said(answer).tokens != oracle.expect(data, 1.0, long).tokens:
                wrong.append((number, turn))

    threads = [threading.Thread(target=stream, args=(api, number, 2 if number else None, 3 if number else 1)) for number, api in enumerate(apis)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = idle(crowd)
    assert not wrong
    assert after["mote_engine_cancelled_total"] > before["mote_engine_cancelled_total"]
    states = [f'mote_engine_kv_blocks{{state="{state}"}}' for state in ("free", "used", "cached")]
    assert sum(after[state] for state in states) == sum(before[state] for state in states) and after[states[1]] == 0


def test_ids_do_not_count_what_others_do(crowd):
    """The ids of two uploads of bob's are as far from each other as any two numbers, whether ann uploads between them or not."""

    def between(uploads) -> int:
        ann, bob = (Api(crowd.url, new_tenant(crowd.url, ADMIN_KEY, f"{name}-counts-{uploads}")) for name in ("ann", "bob"))
        ids = []
        for name in ("a", "b"):
            ids.append(int(bob.call("POST", "/adapters", {"name": name, "numbers": [0.5] * 13}).json()["id"].rsplit("-", 1)[1], 16))
            for number in range(uploads):
                ann.call("POST", "/adapters", {"name": f"{name}-{number}", "numbers": [0.5] * 13})
        return ids[1] - ids[0]

    for uploads in (0, 5):
        assert abs(between(uploads)) > 1 << 32, "ids that are next to each other count"


def test_metrics_do_not_show_what_others_do(crowd):
    """What a member reads in /metrics does not change by another's upload, completion and cache hit."""
    ann, bob = (Api(crowd.url, new_tenant(crowd.url, ADMIN_KEY, f"{name}-of-the-metrics")) for name in ("ann", "bob"))
    path, body = QUESTIONS[0].request()

    def read() -> str:
        answer = bob.call("GET", "/metrics")
        assert answer.status == 200 and b"mote_tenant_requests" in answer.body
        return answer.body.decode()

    idle(crowd)
    before = read()
    assert ann.call("POST", "/adapters", {"name": "mine", "numbers": [0.5] * 13}).status == 201
    for _ in range(2):
        assert ann.call("POST", path, body | {"model": "mine"}).status == 200
    idle(crowd)
    assert read() == before
