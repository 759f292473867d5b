"""The official OpenAI client against Mote: sync, async, streams, errors, retries."""

import asyncio
import base64
import json
import math
import struct
import urllib.error
import urllib.request

import httpx2 as httpx
import openai
import pytest
from conftest import ADMIN_KEY

BASE = "smollm2-135m"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def client(server, key="any", **options):
    return openai.OpenAI(base_url=server.url + "/v1", api_key=key, **options)


def post(server, path, body, content_type="application/json", key=ADMIN_KEY):
    request = urllib.request.Request(
        server.url + path, data=body, method="POST",
        headers={"authorization": f"Bearer {key}", "content-type": content_type},
    )
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def test_models(real):
    models = client(real).models.list().data
    assert [m.id for m in models] == [BASE]
    assert client(real).models.retrieve(BASE).owned_by


def test_chat(real):
    answer = client(real).chat.completions.create(model=BASE, messages=QUESTION, temperature=0, max_tokens=16)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.object == "chat.completion" and answer.id and answer.created


def test_chat_stream_equals_chat(real):
    whole = client(real).chat.completions.create(model=BASE, messages=QUESTION, temperature=0, max_tokens=16)
    chunks = list(client(real).chat.completions.create(
        model=BASE, messages=QUESTION, temperature=0, max_tokens=16, stream=True, stream_options={"include_usage": True}
    ))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    assert all(c.choices[0].delta.role is None for c in chunks[1:-1])
    assert len({c.id for c in chunks}) == 1
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == "stop" and not chunks[-2].choices[0].delta.content
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage.model_copy(update={
        "prompt_tokens_details": chunks[-1].usage.prompt_tokens_details})
    assert all(c.usage is None for c in chunks[:-1])


def test_chat_logprobs(real):
    answer = client(real).chat.completions.create(
        model=BASE, messages=QUESTION, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == 4
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0
        assert bytes(entry.bytes).decode() == entry.token
        assert sum(math.exp(t.logprob) for t in entry.top_logprobs) <= 1.0001


def test_completion_choices_and_stop(real):
    answer = client(real).completions.create(model=BASE, prompt="One two three four", n=3, seed=7, max_tokens=12)
    assert [c.index for c in answer.choices] == [0, 1, 2]
    again = client(real).completions.create(model=BASE, prompt="One two three four", n=3, seed=7, max_tokens=12)
    assert [c.text for c in again.choices] == [c.text for c in answer.choices]
    stopped = client(real).completions.create(
        model=BASE, prompt="One, two, three,", temperature=0, max_tokens=32, stop=[", f", "seven"])
    assert stopped.choices[0].finish_reason == "stop" and ", f" not in stopped.choices[0].text


def test_completion_stream_echo_and_token_ids(real):
    got = client(real).completions.create(
        model=BASE, prompt="The sky is", echo=True, logprobs=2, max_tokens=0, extra_body={"return_token_ids": True})
    choice = got.choices[0]
    assert choice.text == "The sky is"
    assert choice.logprobs.token_logprobs[0] is None and all(x <= 0 for x in choice.logprobs.token_logprobs[1:])
    assert len(choice.logprobs.tokens) == len(choice.model_extra["prompt_token_ids"] if "prompt_token_ids" in choice.model_extra else got.model_extra["prompt_token_ids"])
    parts = list(client(real).completions.create(model=BASE, prompt="The sky is", max_tokens=5, temperature=0, stream=True))
    whole = client(real).completions.create(model=BASE, prompt="The sky is", max_tokens=5, temperature=0)
    assert "".join(c.text for p in parts for c in p.choices) == whole.choices[0].text
    assert parts[-1].choices[0].finish_reason == "length" and parts[0].object == "text_completion"


def test_an_adapter_changes_the_answer_and_travels_inline(real):
    numbers = [0.5, -0.5, 0.25] * 4 + [1.0]
    raw = b"".join(struct.pack("<f", x)[2:] for x in numbers)
    assert len(raw) == 26
    post(real, "/adapters?name=alice&scheme=tiny13&dtype=bf16&on_conflict=new_generation", raw, "application/octet-stream")
    ask = dict(prompt="The capital of France is", temperature=0, max_tokens=8, logprobs=1)
    c = client(real)
    base = c.completions.create(model=BASE, **ask).choices[0]
    stored = c.completions.create(model="alice", **ask).choices[0]
    inline = c.completions.create(model=BASE + "+" + base64.urlsafe_b64encode(raw).decode().rstrip("="), **ask).choices[0]
    extra = c.completions.create(model=BASE, extra_body={"adapter": {"name": "alice"}}, **ask).choices[0]
    assert stored.logprobs.token_logprobs == inline.logprobs.token_logprobs == extra.logprobs.token_logprobs
    assert stored.logprobs.token_logprobs != base.logprobs.token_logprobs
    assert c.models.retrieve("alice").model_extra["parent"] == BASE


def test_async_clients_share_a_batch(real):
    async def ask(c, i):
        chunks = await c.chat.completions.create(
            model=BASE, messages=[{"role": "user", "content": f"Count to {i + 3}."}], max_tokens=12, temperature=0, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    async def main():
        async with openai.AsyncOpenAI(base_url=real.url + "/v1", api_key="any") as c:
            together = await asyncio.gather(*(ask(c, i) for i in range(8)))
            assert together == [await ask(c, i) for i in range(8)]

    asyncio.run(main())


def test_errors_are_the_clients_own_exceptions(tiny):
    c = client(tiny, ADMIN_KEY, max_retries=0)
    with pytest.raises(openai.NotFoundError) as unknown:
        c.completions.create(model="nobody", prompt="x")
    assert unknown.value.code == "model_not_found" and unknown.value.param == "model"
    with pytest.raises(openai.BadRequestError) as hot:
        c.completions.create(model="tiny", prompt="x", temperature=3)
    assert hot.value.param == "temperature" and hot.value.type == "invalid_request_error"
    with pytest.raises(openai.AuthenticationError) as stranger:
        client(tiny, "wrong", max_retries=0).models.list()
    assert stranger.value.code == "invalid_api_key"
    with pytest.raises(openai.BadRequestError) as template:
        c.chat.completions.create(model="tiny", messages=QUESTION)
    assert template.value.code == "no_chat_template"


def test_a_permanent_conflict_is_not_retried(tiny):
    body = json.dumps({"name": "taken", "numbers": [0.0] * 13}).encode()
    post(tiny, "/adapters", body)
    with pytest.raises(urllib.error.HTTPError) as conflict:
        post(tiny, "/adapters", body)
    assert conflict.value.code == 409 and conflict.value.headers["x-should-retry"] == "false"
    assert json.load(conflict.value)["error"]["code"] == "name_taken"


def test_the_client_retries_an_overloaded_server():
    """The client's own retry loop works on our envelope: 429 queue_full first, the answer second."""
    calls = []

    def handler(request):
        calls.append(request)
        if len(calls) == 1:
            return httpx.Response(429, headers={"retry-after": "0"}, json={"error": {
                "message": "full", "type": "rate_limit_error", "param": None, "code": "queue_full"}})
        return httpx.Response(200, json={"object": "list", "data": []})

    http = httpx.Client(transport=httpx.MockTransport(handler))
    models = openai.OpenAI(base_url="http://mote/v1", api_key="x", http_client=http).models.list()
    assert models.data == [] and len(calls) == 2
