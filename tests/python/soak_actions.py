"""What a client of the soak does, one thing at a time, and what the answers must be."""

import asyncio
import base64
import contextlib
import json
import re
import time

from kill9 import bf16
from soak_world import BUSY, TENANTS, Client, Outage, Shed, Wrong, b64, expect, fault

PROMPTS = ["Once", "The fox", "Once upon a time there was", "A", "The quick brown fox jumps over", *(
    "It was a dark and stormy night; the rain fell in torrents, " + end for end in ("and so", "but", "except", "when it was"))]


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
