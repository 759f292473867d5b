"""What the tenants of a `World` were told, against what they may have been told. Each property is a method; `violations` runs them all."""

import base64
import collections
import dataclasses
import re

from isolation import BASE64, BLOCK, HASH, ID, MARK, PUBLIC, Event, World, encoded, said

OK = (200, 201, 202, 204)
REFUSED = (404, 409, 412)


@dataclasses.dataclass
class Violation:
    """What is wrong with an answer, and the few events that show it."""

    what: str
    event: Event
    trace: list

    def __str__(self):
        return "\n".join([f"{self.what}", *(f"    {shown(event, event is self.event)}" for event in self.trace)])


def shown(event: Event, wrong: bool) -> str:
    answer = event.answer
    line = f"{'->' if wrong else '  '} {answer.begin:.4f}..{answer.end:.4f} tenant {event.tenant} worker {event.worker} #{event.turn} {event.method} {event.path} {answer.status}"
    if event.data is not None:
        line += f" numbers {encoded(event.data)}"
    return line + (f"\n       sent {answer.sent[:900]}\n       got {answer.headers} {answer.body[:900]!r}" if wrong else "")


@dataclasses.dataclass
class Write:
    begin: float
    end: float
    value: bytes | None
    event: Event


class Register:
    """What a name means: a write takes effect at some moment between its request and its answer."""

    def __init__(self):
        self.writes: list[Write] = []

    def standing(self, begin: float, end: float) -> list[Write]:
        """Writes that a request between the two may have seen: begun in time, and none came wholly between them and the request."""
        settled = self.settled(begin)
        return [write for write in self.writes if write.begin < end and write.end >= settled]

    def settled(self, begin: float) -> float:
        return max((write.begin for write in self.writes if write.end < begin), default=float("-inf"))

    def values(self, begin: float, end: float) -> set:
        never = {None} if self.settled(begin) == float("-inf") else set()
        return {write.value for write in self.standing(begin, end)} | never


class Checker:
    """Over all events of a world, when its workers have ended."""

    def __init__(self, world: World, events: list[Event]):
        self.world, self.oracle, self.events = world, world.oracle, sorted(events, key=lambda event: event.answer.begin)
        self.found: list[Violation] = []
        self.ran: list[tuple[Event, bytes | None, dict | None]] = []  # completions with the numbers that answered, and their usage
        self.registers = collections.defaultdict(Register)
        for event in self.events:
            for name, value in event.writes.items():
                self.registers[event.tenant, name].writes.append(Write(event.answer.begin, event.answer.end, value, event))
                if event.tenant == 0 and name == PUBLIC:
                    lent = value if event.public else None
                    self.registers["public", name].writes.append(Write(event.answer.begin, event.answer.end, lent, event))
        self.by_tenant = collections.defaultdict(list)
        for event in self.events:
            self.by_tenant[event.tenant].append(event)

    def violations(self) -> list[Violation]:
        for event in self.events:
            self.status(event)
            check = getattr(self, "of_" + event.what.replace("-", "_"), None)
            if check and event.answer.status in OK + REFUSED:
                check(event)
        self.cache()
        self.marks()
        self.ids()
        return self.found

    def wrong(self, event: Event, what: str, also=()):
        trace = {id(other): other for other in [*also, event]}
        self.found.append(Violation(f"{what} (tenant {event.tenant}, worker {event.worker}, #{event.turn})", event, sorted(trace.values(), key=lambda e: e.answer.begin)))

    # What a name may mean to a request.

    def visible(self, event: Event, name: str) -> set:
        """Its own, and where it may have none the public one."""
        span = event.answer.begin, event.answer.end
        own = self.registers[event.tenant, name].values(*span)
        return own | self.registers["public", name].values(*span) if None in own else own

    def own(self, event: Event, name: str) -> set:
        return self.registers[event.tenant, name].values(event.answer.begin, event.answer.end)

    def writers(self, event: Event, name: str) -> list[Event]:
        span = event.answer.begin, event.answer.end
        return [write.event for key in [(event.tenant, name), ("public", name)] for write in self.registers[key].standing(*span)]

    def owner(self, data: bytes) -> str:
        owners = [f"tenant {tenant.number}" for tenant in self.world.tenants if data in tenant.private]
        return owners[0] if owners else "every tenant" if data in self.world.common else "nobody"

    def uploads(self, data: bytes, event: Event) -> list[Event]:
        """The last requests of others that gave somebody these numbers."""
        return [e for e in self.events if data in e.writes.values() and e.tenant != event.tenant and e.answer.begin < event.answer.end][-2:]

    def means(self, event: Event, name: str, data: bytes | None, may: set, words: str):
        if data not in may:
            whose = "nothing" if data is None else f"numbers of {self.owner(data)} ({encoded(data)})"
            allowed = ", ".join("nothing" if value is None else encoded(value) for value in may)
            also = self.writers(event, name) + ([] if data is None else self.uploads(data, event))
            self.wrong(event, f"{words}: '{name}' was {whose}; to this tenant it was one of: {allowed}", also)

    # Properties of single answers.

    def status(self, event: Event):
        if event.answer.status >= 500 or event.answer.status in (400, 401, 403, 429):
            self.wrong(event, f"unexpected status {event.answer.status}")

    def of_complete(self, event: Event):
        answer = event.answer
        may = {event.data} if event.name is None else self.visible(event, event.name)
        if answer.status == 404:
            return self.means(event, event.name or "", None, may, "a model was not found")
        got, generation = said(answer), answer.headers.get("x-adapter-generation")
        if not got.tokens and answer.cut:
            self.ran.append((event, self.data(event, generation), None))
            return self.means(event, event.name or "", self.data(event, generation), may, "a stream's generation")
        fitting = [data for data in may if (data is not None or event.name is None) and self.fits(event, got, data)]
        if not fitting:
            for data in [None, *self.world.data_of.values()]:
                if self.fits(event, got, data):
                    whose = "the base" if data is None else f"the numbers of {self.owner(data)} ({encoded(data)})"
                    also = self.writers(event, event.name or "") + ([] if data is None else self.uploads(data, event))
                    return self.wrong(event, f"this was said under {whose}, which this tenant's '{event.name}' was not", also)
            return self.wrong(event, "no adapter of anybody says this", self.writers(event, event.name or ""))
        if self.data(event, generation) not in fitting:
            self.wrong(event, f"the generation {generation} is not that of what answered", self.writers(event, event.name or ""))
        self.ran.append((event, fitting[0], got.usage))

    def data(self, event: Event, generation: str | None) -> bytes | None:
        if generation is not None and generation not in self.world.data_of:
            self.wrong(event, f"nobody uploaded the generation {generation}")
        return self.world.data_of.get(generation)

    def fits(self, event: Event, got, data: bytes | None) -> bool:
        want = self.oracle.expect(data, event.scale, event.question)
        if event.answer.cut:
            length = len(got.tokens)
            return (got.tokens, got.logprobs) == (want.tokens[:length], want.logprobs[:length]) and want.text.startswith(got.text)
        return (got.text, got.tokens, got.logprobs) == (want.text, want.tokens, want.logprobs)

    def cache(self):
        """A hit is at most what this tenant itself has sent under these numbers."""
        left = collections.defaultdict(list)
        for event, data, _ in self.ran:
            want = self.oracle.expect(data, event.scale, event.question)
            left[event.tenant, data, event.scale].append((event, want.prompt + want.tokens))
        for event, data, usage in self.ran:
            if usage is None:
                continue
            prompt = self.oracle.expect(data, event.scale, event.question).prompt
            own = [common(prompt, tokens) for other, tokens in left[event.tenant, data, event.scale] if other is not event and other.answer.begin < event.answer.end]
            most, cached = max(own, default=0) // BLOCK * BLOCK, usage["prompt_tokens_details"]["cached_tokens"]
            if cached > most:
                also = [e for e, d, _ in self.ran if (e.question, d, e.scale) == (event.question, data, event.scale) and e.answer.begin < event.answer.end and e.tenant != event.tenant]
                self.wrong(event, f"{cached} cached tokens, where this tenant itself had left at most {most}", also[-3:])

    def wrote(self, event: Event):
        """An upload's answer is about what was uploaded; a refusal about what this tenant has."""
        answer = event.answer
        if answer.status in OK:
            generation = answer.json()["generation"]
            if self.data(event, generation) != event.writes[event.name]:
                self.wrong(event, "the answer to an upload is about other numbers", self.uploads(self.data(event, generation), event))
            self.owned(event, answer.json())
        elif answer.status == 409 and self.own(event, event.name) == {None}:
            self.wrong(event, "a name was taken that this tenant does not have")
        elif answer.status == 412:
            current = re.search(HASH, answer.json()["error"]["message"]).group()
            self.means(event, event.name, self.data(event, current), self.own(event, event.name) - {None}, "the current generation")
        elif answer.status == 404 and event.what != "rollback":
            self.means(event, event.name, None, self.own(event, event.name), "an adapter was not found")

    of_upload = of_once = of_replace = of_rollback = wrote

    def of_delete(self, event: Event):
        if event.answer.status == 404:
            self.means(event, event.name, None, self.own(event, event.name), "an adapter was not found")
        elif self.own(event, event.name) == {None}:
            self.wrong(event, "an adapter was deleted that this tenant does not have")

    def owned(self, event: Event, adapter: dict):
        """Whose an adapter is, as an answer says it."""
        me, lender = self.world.tenants[event.tenant].name, self.world.tenants[0].name
        if adapter["owner"] != me and not (adapter["owner"] == lender and adapter["public"] and adapter["name"] == PUBLIC):
            self.wrong(event, f"an adapter of '{adapter['owner']}'")

    def seen(self, event: Event, adapter: dict):
        self.owned(event, adapter)
        self.means(event, adapter["name"], self.data(event, adapter["generation"]), self.visible(event, adapter["name"]) - {None}, "an adapter's generation")

    def of_get(self, event: Event):
        if event.answer.status == 404:
            return self.means(event, event.name, None, self.visible(event, event.name), "an adapter was not found")
        self.seen(event, event.answer.json())

    def of_list(self, event: Event):
        for adapter in (listed := event.answer.json()["data"]):
            self.seen(event, adapter)
        self.whole(event, {adapter["name"] for adapter in listed})

    def whole(self, event: Event, listed: set):
        for name in {name for tenant, name in self.registers if tenant in (event.tenant, "public")} - listed:
            self.means(event, name, None, self.visible(event, name), "a list without an adapter")

    def of_models(self, event: Event):
        models = [model["id"] for model in event.answer.json()["data"] if model["parent"]]
        for name in models:
            if self.visible(event, name) == {None}:
                self.wrong(event, f"a model '{name}' that this tenant does not have", self.writers(event, name))
        self.whole(event, set(models))

    def of_model(self, event: Event):
        if event.answer.status == 404:
            return self.means(event, event.name, None, self.visible(event, event.name), "a model was not found")
        if self.visible(event, event.name) == {None}:
            self.wrong(event, "a model that this tenant does not have")

    def of_weights(self, event: Event):
        answer, may = event.answer, self.visible(event, event.name)
        if answer.status == 404:
            return self.means(event, event.name, None, may, "an adapter was not found")
        data = self.data(event, answer.headers["x-adapter-generation"])
        if event.path.endswith("=raw"):
            data = answer.body
        elif event.path.endswith("=json"):
            data = base64.b64decode(answer.json()["data"])
        self.means(event, event.name, data, may - {None}, "exported numbers")

    def of_generations(self, event: Event):
        if event.answer.status == 404:
            return self.means(event, event.name, None, self.own(event, event.name), "an adapter was not found")
        written = {write.value for write in self.registers[event.tenant, event.name].writes if write.begin < event.answer.end}
        for entry in event.answer.json()["data"]:
            self.means(event, event.name, self.data(event, entry["generation"]), written - {None}, "a generation")

    def of_snoop(self, event: Event):
        if event.answer.status != 404:
            self.wrong(event, "another's file or job was found")

    def of_usage(self, event: Event):
        answer, tenant = event.answer.json(), self.world.tenants[event.tenant]
        if answer["tenant"] != tenant.name:
            self.wrong(event, f"the usage of '{answer['tenant']}'")
        for field, (least, most) in self.used(event).items():
            if answer["total"][field] > most:
                self.wrong(event, f"{answer['total'][field]} {field}, where this tenant used at most {most}")
            elif event.what == "last-usage" and answer["total"][field] < least:
                self.wrong(event, f"{answer['total'][field]} {field}, where this tenant used at least {least}")

    of_last_usage = of_usage

    def used(self, event: Event) -> dict:
        """What was used by the time of the answer: at least, if all was counted, and at most."""
        least, most = collections.Counter(), collections.Counter()
        for other in self.by_tenant[event.tenant]:
            if other.answer.begin > event.answer.end or not other.metered():
                continue
            most["requests"] += 1
            least["requests"] += 1
            if other.what == "complete" and other.answer.status == 200:
                got, prompt = said(other.answer), len(self.oracle.expect(None, 1.0, other.question).prompt)
                most["prompt_tokens"] += prompt
                most["completion_tokens"] += other.question.max_tokens
                if not other.answer.cut:
                    least["prompt_tokens"] += prompt
                    least["completion_tokens"] += len(got.tokens)
        return {field: (least[field], most[field]) for field in ("requests", "prompt_tokens", "completion_tokens")}

    # Properties of all answers.

    def marks(self):
        """Texts, numbers and generations of a tenant's own are in no answer to another, but for what it sent itself and what is lent."""
        owners = {}
        for tenant in self.world.tenants:
            shown = ("lent", "name") if tenant.number == 0 else ()
            owners |= {mark: tenant.number for what, mark in tenant.marks.items() if what not in shown}
            for data in tenant.private:
                owners |= {text: tenant.number for text in (encoded(data), base64.urlsafe_b64encode(data).decode().rstrip("="), self.oracle.generation(data))}
        lent = {write.value for write in self.registers["public", PUBLIC].writes} - {None}
        for data in lent:
            for text in (encoded(data), self.oracle.generation(data)):
                owners.pop(text, None)
        for event in self.events:
            text = told(event)
            for found in {*MARK.findall(text), *HASH.findall(text), *BASE64.findall(text)}:
                if owners.get(found, event.tenant) != event.tenant and found not in event.answer.sent:
                    self.wrong(event, f"'{found}', which is tenant {owners[found]}'s")

    def ids(self):
        """No two tenants are told one id, but for those of what is lent."""
        lent = {event.answer.json()["id"] for event in self.by_tenant[0] if event.name == PUBLIC and event.what == "upload" and event.answer.status in OK}
        first = {}
        for event in self.events:
            for id in set(ID.findall(told(event))) - lent:
                if id in event.answer.sent:
                    continue
                before = first.setdefault(id, event)
                if before.tenant != event.tenant:
                    self.wrong(event, f"the id '{id}', which tenant {before.tenant} was told", [before])


def told(event: Event) -> str:
    return f"{event.answer.headers} {event.answer.body.decode(errors='replace')}"


def common(a: list, b: list) -> int:
    """How many tokens two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
