"""Tenants with the same names and prompts on one server, and a checker of everything that they were told.

Workers of several tenants send random requests at once, and each keeps what it sent and got as an `Event`. The checker reads the events afterwards and shares no
code with the server: what an adapter says is asked of another server, which is quiet (no tenants, no cache, one sequence a step), and what a name may mean at a
moment follows from when its writes began and were answered.
"""

import base64
import collections
import dataclasses
import hashlib
import http.client
import json
import random
import re
import struct
import threading
import time
import urllib.parse

BLOCK = 16  # tokens of a block of the prefix cache: hits come in multiples of it
NAMES = ("alpha", "beta", "house")
PUBLIC = "house"  # the one name that tenant 0, which has an admin's key, lends to everybody now and then
ONCE = tuple(f"once-{k}" for k in range(2))  # uploaded under an Idempotency-Key that all tenants use; never deleted
BASE = "tiny"

MARK = re.compile(r"mk[0-9a-f]{14}")
ID = re.compile(r"\b(?:adapter|file|ftjob|ftevent|ftckpt|cmpl|chatcmpl|req)-[0-9a-f]{16,}\b")
HASH = re.compile(r"\b[0-9a-f]{32}\b")
BASE64 = re.compile(r"[A-Za-z0-9+/_-]{34,35}={0,2}")


def mark(*of) -> str:
    """A text that occurs nowhere by chance."""
    return "mk" + hashlib.blake2s(repr(of).encode()).hexdigest()[:14]


def numbers(*of) -> bytes:
    """26 bytes: 13 finite numbers in bf16."""
    rng = random.Random(repr(of))
    return b"".join(struct.pack("<f", rng.uniform(-1, 1))[2:] for _ in range(13))


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def inline(data: bytes) -> str:
    """The `model` of an adapter that travels in the request."""
    return f"{BASE}+{base64.urlsafe_b64encode(data).decode().rstrip('=')}"


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked, always greedily: a prompt of token ids, or a chat's text."""

    prompt: tuple | str
    max_tokens: int

    def request(self) -> tuple[str, dict]:
        body = {"temperature": 0, "max_tokens": self.max_tokens, "ignore_eos": True, "return_token_ids": True}
        if isinstance(self.prompt, str):
            return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": self.prompt}], "logprobs": True}
        return "/v1/completions", body | {"prompt": list(self.prompt), "logprobs": 0}


def questions() -> list[Question]:
    """Some begin alike, so that one's cached blocks fit another."""
    rng = random.Random("questions")
    tokens = [rng.randrange(2, 320) for _ in range(120)]
    start = tokens[:34]
    return [
        Question((*start, *tokens[40:60]), 6),
        Question((*start, *tokens[60:72]), 6),
        Question(tuple(tokens[80:]), 10),
        Question(tuple(start[:24]), 24),
        Question("Which of us was here before, and what did they ask of you?", 6),
        Question("Which of us was here before, and what did they leave in your cache?", 16),
    ]


QUESTIONS = questions()


@dataclasses.dataclass
class Answer:
    """What came back, and when it was asked for and whole."""

    status: int
    headers: dict
    body: bytes
    begin: float
    end: float
    sent: str = ""
    cut: bool = False

    def json(self):
        return json.loads(self.body)


class Api:
    """One connection under one key."""

    def __init__(self, url: str, key: str = "none"):
        self.address, self.key = urllib.parse.urlsplit(url).netloc, key
        self.connection = http.client.HTTPConnection(self.address, timeout=120)

    def call(self, method, path, body=None, kind="application/json", headers=None, leave_after=None) -> Answer:
        """Sends a request and reads its answer; of a stream at most `leave_after` chunks, and then the connection is closed."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        headers = {"authorization": f"Bearer {self.key}", **(headers or {})} | ({"content-type": kind} if data is not None else {})
        sent = " ".join([path, repr({k: v for k, v in headers.items() if k != "authorization"}), (data or b"").decode(errors="replace")])
        begin = time.monotonic()
        self.connection.request(method, path, data, headers)
        response = self.connection.getresponse()
        got, cut = [], False
        if leave_after is None or response.status != 200:
            got.append(response.read())
        else:
            while (line := response.readline()) and not cut:
                got.append(line)
                cut = sum(line.startswith(b"data: {") for line in got) >= leave_after
        end = time.monotonic()
        if cut:
            response.close()
            self.connection.close()
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, b"".join(got), begin, end, sent, cut)


@dataclasses.dataclass
class Said:
    """The choice of a completion or chat, whole or put together from a stream's chunks."""

    text: str
    tokens: list
    logprobs: list
    prompt: list
    usage: dict | None


def said(answer: Answer) -> Said:
    if "text/event-stream" in answer.headers.get("content-type", ""):
        chunks = [json.loads(line[6:]) for line in answer.body.splitlines() if line.startswith(b"data: {")]
    else:
        chunks = [answer.json()]
    whole = Said("", [], [], [], None)
    for chunk in chunks:
        whole.usage = chunk.get("usage") or whole.usage
        whole.prompt += chunk.get("prompt_token_ids") or []
        for choice in chunk["choices"]:
            message = choice.get("delta") or choice.get("message") or {}
            whole.text += choice.get("text") or message.get("content") or ""
            whole.tokens += choice.get("token_ids") or []
            whole.prompt += choice.get("prompt_token_ids") or []
            scores = choice.get("logprobs") or {}
            whole.logprobs += scores.get("token_logprobs") or [entry["logprob"] for entry in scores.get("content") or []]
    return whole


class Oracle:
    """What an adapter's numbers answer to a question, and their generation: asked once of a quiet server that they are sent to with the question."""

    def __init__(self, url: str):
        self.api, self.known, self.generations = Api(url), {}, {}

    def expect(self, data: bytes | None, scale: float, question: Question) -> Said:
        key = (data, scale, question)
        if key not in self.known:
            path, body = question.request()
            adapter = {} if data is None else {"adapter": {"data": encoded(data), "scale": scale}}
            answer = self.api.call("POST", path, {"model": BASE, **body, **adapter})
            assert answer.status == 200, answer.body
            self.known[key] = said(answer)
        return self.known[key]

    def generation(self, data: bytes | None) -> str | None:
        if data is not None and data not in self.generations:
            answer = self.api.call("POST", "/v1/completions", {"model": inline(data), "prompt": [5], "max_tokens": 1})
            self.generations[data] = answer.headers["x-adapter-generation"]
        return self.generations.get(data)


@dataclasses.dataclass
class Tenant:
    """A name, a key, what it uploads, and the texts that are its own."""

    number: int
    name: str
    key: str
    private: list
    marks: dict

    def __str__(self):
        return f"tenant {self.number}"


@dataclasses.dataclass
class Event:
    """A request and its answer."""

    tenant: int
    worker: int
    turn: int
    what: str
    method: str
    path: str
    answer: Answer
    name: str | None = None
    data: bytes | None = None  # of an upload or an inline adapter
    public: bool = False
    question: Question | None = None
    scale: float = 1.0
    writes: dict = dataclasses.field(default_factory=dict)  # name -> numbers, or None when it was deleted: what was acknowledged

    def metered(self) -> bool:
        return self.method in ("PUT", "POST")


class World:
    """One round's tenants, the first of them with an admin's key, and what they have learnt of each other."""

    def __init__(self, url: str, admin_key: str, oracle: Oracle, seed, tenants: int):
        self.url, self.seed, self.oracle = url, seed, oracle
        self.common = [numbers(seed, "common", k) for k in range(2)]
        self.lock, self.ids = threading.Lock(), collections.defaultdict(list)
        self.tenants = []
        for number in range(tenants + 1):
            name = mark(seed, number, "name")
            key = new_tenant(url, admin_key, name, "member" if number else "admin")
            self.tenants.append(self.tenant(number, name, key))
        every = [data for tenant in self.tenants for data in tenant.private] + self.common
        self.data_of = {oracle.generation(data): data for data in every}

    def tenant(self, number, name, key) -> Tenant:
        marks = {what: mark(self.seed, number, what) for what in ("name", "metadata", "lent", "filename", "file", "user", "job")}
        return Tenant(number, name, key, [numbers(self.seed, number, k) for k in range(2)], marks)

    def learn(self, tenant: int, kind: str, id: str):
        with self.lock:
            self.ids[tenant, kind].append(id)

    def known(self, tenant: int, kind: str) -> list:
        with self.lock:
            return list(self.ids[tenant, kind])


def new_tenant(url: str, admin_key: str, name: str, role: str = "member") -> str:
    """Makes a tenant and gives a key of it."""
    admin = Api(url, admin_key)
    made = admin.call("POST", "/admin/tenants", {"name": name})
    assert made.status in (200, 201), made.body
    key = admin.call("POST", f"/admin/tenants/{name}/keys", {"role": role})
    assert key.status in (200, 201), key.body
    return key.json()["key"]


class Worker:
    """One client of a tenant: a random request after the other. What it asks for depends on the seed alone, but for ids, which the server makes."""

    MEMBER = {"upload": 6, "replace": 6, "delete": 4, "rollback": 4, "batch": 2, "once": 2, "complete": 40, "get": 3, "weights": 3, "generations": 2, "list": 2,
             "models": 2, "usage": 2, "file": 2, "files": 2, "jobs": 2, "job": 1, "snoop": 8, "metrics": 1}
    ADMIN = {"lend": 8, "batch": 2, "replace": 2, "delete": 4, "complete": 8, "list": 1}

    def __init__(self, world: World, tenant: Tenant, number: int):
        self.world, self.me, self.number = world, tenant, number
        self.api = Api(world.url, tenant.key)
        self.rng = random.Random(repr((world.seed, tenant.number, number)))
        self.often = self.MEMBER if tenant.number else self.ADMIN
        self.events: list[Event] = []

    def run(self, until: float, least: int):
        while time.monotonic() < until or len(self.events) < least:
            what = self.rng.choices(list(self.often), self.often.values())[0]
            getattr(self, f"do_{what}")()

    def ask(self, what, method, path, body=None, kind="application/json", headers=None, leave_after=None, **facts) -> Event:
        answer = self.api.call(method, path, body, kind, headers, leave_after)
        event = Event(self.me.number, self.number, len(self.events), what, method, path, answer, **facts)
        self.events.append(event)
        return event

    def some_numbers(self) -> bytes:
        """Its own, or numbers that every tenant uploads."""
        return self.rng.choice(self.me.private + self.world.common)

    def some_name(self) -> str:
        return self.rng.choice(NAMES)

    def other(self) -> Tenant:
        return self.rng.choice([tenant for tenant in self.world.tenants if tenant is not self.me])

    def wrote(self, event: Event, value: bytes | None):
        if event.answer.status in (200, 201, 204):
            event.writes[event.name] = value
        if event.answer.status in (200, 201):
            self.world.learn(self.me.number, "generation", event.answer.json()["generation"])

    def upload_body(self, name, data, **more) -> dict:
        return {"name": name, "data": encoded(data), "metadata": {"note": self.me.marks["metadata"]}} | more

    def do_upload(self):
        name, data = self.some_name(), self.some_numbers()
        conflict = self.rng.choice(["error", "new_generation"])
        self.wrote(self.ask("upload", "POST", "/adapters", self.upload_body(name, data, on_conflict=conflict), name=name, data=data), data)

    def do_lend(self):
        data, public = self.rng.choice(self.me.private), self.rng.random() < 0.8
        lent = {"note": self.me.marks["lent"]}
        body = self.upload_body(PUBLIC, data, on_conflict="new_generation", public=public, metadata=lent)
        self.wrote(self.ask("upload", "POST", "/adapters", body, name=PUBLIC, data=data, public=public), data)

    def do_once(self):
        k = self.rng.randrange(len(ONCE))
        data = self.me.private[k]
        event = self.ask("once", "POST", "/adapters", self.upload_body(ONCE[k], data), headers={"idempotency-key": f"retry-{k}"}, name=ONCE[k], data=data)
        self.wrote(event, data)

    def do_replace(self):
        name, data = self.some_name() if self.me.number else self.rng.choice(NAMES[:2]), self.some_numbers()
        headers = {}
        if self.rng.random() < 0.5:
            known = self.world.known(self.me.number, "generation") or [32 * "0"]
            headers = {"if-match": f'"{self.rng.choice(known[-4:])}"'}
        path = f"/adapters/{name}?scheme=tiny13&dtype=bf16"
        self.wrote(self.ask("replace", "PUT", path, data, "application/octet-stream", headers, name=name, data=data), data)

    def do_delete(self):
        name = self.some_name()
        self.wrote(self.ask("delete", "DELETE", f"/adapters/{name}", name=name), None)

    def do_rollback(self):
        """To a generation of its own, or to another's."""
        name, owner = self.some_name(), self.me if self.rng.random() < 0.8 else self.other()
        generation = self.rng.choice(self.world.known(owner.number, "generation") or [32 * "0"])
        event = self.ask("rollback", "POST", f"/adapters/{name}/rollback", {"generation": generation}, name=name)
        if event.answer.status == 200:
            event.writes[name] = self.world.data_of[generation]

    def do_batch(self):
        items = {name: self.some_numbers() for name in NAMES[:2]}
        lines = "\n".join(json.dumps(self.upload_body(name, data, on_conflict="new_generation")) for name, data in items.items())
        event = self.ask("batch", "POST", "/adapters/batch", lines.encode(), "application/x-ndjson")
        for line in event.answer.body.splitlines():
            line = json.loads(line)
            if "generation" in line:
                event.writes[line["name"]] = items[line["name"]]

    def do_complete(self):
        question, name, scale, data = self.rng.choice(QUESTIONS), self.some_name(), 1.0, None
        path, body = question.request()
        body["user"] = self.me.marks["user"]
        match self.rng.randrange(8):
            case 0:
                name, body["model"] = None, BASE
            case 1:
                data = self.rng.choice(self.world.common)
                name, body["model"] = None, inline(data)
            case 2:
                body["model"] = f"{BASE}:{name}"
            case 3:
                scale = 0.5
                body |= {"model": BASE, "adapter": {"name": name, "scale": scale}}
            case 4:
                name = self.rng.choice(ONCE)
                body["model"] = name
            case _:
                body["model"] = name
        leave_after = None
        if self.rng.random() < 0.5:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
            leave_after = self.rng.choice([None, 1, 3, 9])
        self.ask("complete", "POST", path, body, leave_after=leave_after, name=name, data=data, question=question, scale=scale)

    def do_get(self):
        name = self.some_name()
        self.ask("get", "GET", f"/adapters/{name}", name=name)

    def do_weights(self):
        name, form = self.some_name(), self.rng.choice(["raw", "json", "peft"])
        self.ask("weights", "GET", f"/adapters/{name}/weights?format={form}", name=name)

    def do_generations(self):
        name = self.some_name()
        self.ask("generations", "GET", f"/adapters/{name}/generations", name=name)

    def do_list(self):
        self.ask("list", "GET", "/adapters")

    def do_models(self):
        if self.rng.random() < 0.5:
            self.ask("models", "GET", "/v1/models")
        else:
            name = self.some_name()
            self.ask("model", "GET", f"/v1/models/{name}", name=name)

    def do_usage(self):
        self.ask("usage", "GET", "/usage")

    def last_usage(self, team: list):
        """What the tenant used, when its workers ask for nothing more: all of it is counted within seconds."""
        events = [event for worker in team for event in worker.events]
        read = [event.answer for event in events if event.what == "complete" and event.answer.status == 200 and not event.answer.cut]
        least = {"requests": sum(event.metered() for event in events), "completion_tokens": sum(len(said(answer).tokens) for answer in read)}
        deadline = time.monotonic() + 20
        while True:
            total = self.ask("last-usage", "GET", "/usage").answer.json()["total"]
            if all(total[field] >= count for field, count in least.items()) or time.monotonic() > deadline:
                return
            self.events.pop()
            time.sleep(0.2)

    def do_metrics(self):
        self.ask("metrics", "GET", "/metrics")

    def do_file(self):
        line = json.dumps({"prompt": "The fox", "answer": self.me.marks["file"]})
        form = "\r\n".join([
            "--edge", 'content-disposition: form-data; name="purpose"', "", "fine-tune",
            "--edge", f'content-disposition: form-data; name="file"; filename="{self.me.marks["filename"]}.jsonl"', "", line, "--edge--", ""])
        event = self.ask("file", "POST", "/v1/files", form.encode(), "multipart/form-data; boundary=edge")
        if event.answer.status == 200:
            self.world.learn(self.me.number, "file", event.answer.json()["id"])

    def do_files(self):
        own = self.world.known(self.me.number, "file")
        match self.rng.randrange(3):
            case 1 if own:
                self.ask("file-content", "GET", f"/v1/files/{self.rng.choice(own)}/content")
            case 2 if own:
                self.ask("file-get", "GET", f"/v1/files/{self.rng.choice(own)}")
            case _:
                self.ask("files", "GET", "/v1/files")

    def do_jobs(self):
        self.ask("jobs", "GET", self.rng.choice(["/v1/fine_tuning/jobs", "/adapters/train"]))

    def do_job(self):
        """A job that is cancelled at once: what it holds and says is another thing that could be seen."""
        body = {"name": f"job-{self.number}-{len(self.events)}", "method": "es", "dataset": [{"prompt": self.me.marks["job"], "answer": "e"}],
                "grader": {"type": "string_check", "reference": "e", "operation": "like"}, "metadata": {"note": self.me.marks["metadata"]},
                "hyperparameters": {"steps": 1000, "prompts_per_step": 1, "population": 2, "max_completion_tokens": 2, "flat_reward_steps": 0}}
        event = self.ask("job", "POST", "/adapters/train", body)
        if event.answer.status == 202:
            id = event.answer.json()["id"]
            self.world.learn(self.me.number, "job", id)
            self.ask("job-events", "GET", f"/adapters/train/{id}/events")
            self.ask("job-cancel", "POST", f"/adapters/train/{id}/cancel")

    def do_snoop(self):
        """Asks for what is another's, by its true id."""
        owner = self.other().number
        kind = self.rng.choice(["file", "job"])
        id = self.rng.choice(self.world.known(owner, kind) or [f"{'file' if kind == 'file' else 'ftjob'}-{32 * '0'}"])
        routes = {
            "file": [("GET", "/v1/files/{}"), ("GET", "/v1/files/{}/content"), ("DELETE", "/v1/files/{}")],
            "job": [("GET", "/adapters/train/{}"), ("GET", "/adapters/train/{}/events"), ("GET", "/adapters/train/{}/checkpoints"), ("GET", "/adapters/train/{}/samples"),
                    ("POST", "/adapters/train/{}/cancel"), ("GET", "/v1/fine_tuning/jobs/{}"), ("GET", "/v1/fine_tuning/jobs/{}/events"),
                    ("POST", "/v1/fine_tuning/jobs/{}/cancel")],
        }
        method, path = self.rng.choice(routes[kind])
        self.ask("snoop", method, path.format(id))

