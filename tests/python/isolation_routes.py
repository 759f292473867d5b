"""A tenant that has one of everything, and all that another may ask about it: every route of the OpenAPI document, so that none is forgotten."""

import json
import re
import time

from conftest import ADMIN_KEY, ROOT
from isolation import BASE, QUESTIONS, Api, Question, encoded, new_tenant, numbers


class Ann:
    """A tenant that has one of everything, and every id of it."""

    def __init__(self, server):
        self.admin, self.key = Api(server.url, ADMIN_KEY), new_tenant(server.url, ADMIN_KEY, "ann")
        self.api = Api(server.url, self.key)
        self.ids = {"tenant": "ann", "key": self.admin.call("GET", "/admin/tenants/ann/keys").json()["data"][0]["id"]}
        for number in range(2):
            body = {"name": "mine", "data": encoded(numbers("ann", number)), "on_conflict": "new_generation"}
            uploaded = self.made("POST", "/adapters", body, headers={"idempotency-key": f"anns-{number}"})
            self.ids |= {"name": "mine", "adapter": uploaded["id"], "generation": uploaded["generation"]}
        self.ids["file"] = self.made("POST", "/v1/files", FORM, FORM_TYPE)["id"]
        self.ids["job"] = self.job("trained", 1)
        self.ids["reserved"] = "reserved"
        while self.api.call("GET", f"/adapters/train/{self.ids['job']}").json()["status"] not in ("succeeded", "failed"):
            time.sleep(0.02)
        self.ids["trained"] = self.api.call("GET", f"/adapters/train/{self.ids['job']}").json()["result"]["adapter"]
        self.ids["paused job"] = self.job("reserved", 20_000)
        self.api.call("POST", f"/adapters/train/{self.ids['paused job']}/pause")
        self.ids["event"] = self.api.call("GET", f"/v1/fine_tuning/jobs/{self.ids['job']}/events").json()["data"][0]["id"]
        self.ids["checkpoint"] = self.api.call("GET", f"/v1/fine_tuning/jobs/{self.ids['job']}/checkpoints").json()["data"][0]["id"]
        question = QUESTIONS[0].request()
        self.ids["completion"] = self.made("POST", question[0], {"model": "mine", **question[1]})["id"]

    def made(self, method, path, body, kind="application/json", headers=None) -> dict:
        answer = self.api.call(method, path, body, kind, headers)
        assert answer.status in (200, 201, 202), answer.body
        return answer.json()

    def job(self, name, steps) -> str:
        answer = self.api.call("POST", "/adapters/train", train(name, steps))
        assert answer.status == 202, answer.body
        return answer.json()["id"]


def train(name, steps=1, **more) -> dict:
    return {"name": name, "method": "es", "grader": {"type": "string_check", "reference": "e", "operation": "like"},
            "hyperparameters": {"steps": steps, "prompts_per_step": 1, "population": 2, "max_completion_tokens": 2, "flat_reward_steps": 0}} | (
                more or {"dataset": [{"prompt": "The fox"}]})


FORM_TYPE = "multipart/form-data; boundary=edge"
FORM = "\r\n".join(["--edge", 'content-disposition: form-data; name="purpose"', "", "fine-tune", "--edge", 'content-disposition: form-data; name="file"; filename="secret.jsonl"',
                     "", '{"prompt": "The fox", "answer": "e"}', "--edge--", ""]).encode()


def operations() -> list:
    """(method, path) of every route that the server has; those that delete come last, and the admin's last of all."""
    document = json.loads((ROOT / "openapi/openapi.json").read_text())
    every = [(method.upper(), path) for path, methods in document["paths"].items() for method in methods]
    return sorted(every, key=lambda route: (route[0] == "DELETE", route[1].startswith("/admin"), route[1], route[0]))


def body_of(method, path, ids) -> tuple:
    """What a request to a route with a path parameter may carry."""
    if method == "PUT":
        return numbers("put"), "application/octet-stream"
    if method in ("POST", "PATCH"):
        return ({"generation": ids["generation"]} if path.endswith("/rollback") else {}), "application/json"
    return None, "application/json"


def filled(path, id) -> str:
    return re.sub(r"\{\w+\}", id, path)


def questions_about(ids) -> list:
    """(method, path, body, kind, headers) of everything that bob asks: each route with each id of ann's, and each place of a body or a query that takes one."""
    asked = []
    for method, path in operations():
        for id in ids.values() if "{" in path else []:
            body, kind = body_of(method, path, ids)
            for extra in [{}] if method != "PUT" else [{}, {"if-match": ids["generation"]}]:
                asked.append((method, filled(path, id), body, kind, extra))
            if path.endswith("/events"):
                asked.append((method, filled(path, id), body, kind, {"accept": "text/event-stream"}))
            if path.endswith("/weights"):
                asked += [(method, f"{filled(path, id)}?format={form}", body, kind, {}) for form in ("json", "peft")]
        if method == "GET" and "{" not in path and path not in ("/metrics", "/healthz", "/readyz"):
            asked.append((method, path, None, "application/json", {}))
            asked += [(method, f"{path}?{query}={id}", None, "application/json", {}) for id in ids.values() for query in ("after", "prefix")]
    path, body = Question((5, 6, 7), 3).request()
    chat, talk = Question("who", 3).request()
    for id in ids.values():
        naming = [{"model": id}, {"model": f"{BASE}:{id}"}, {"model": BASE, "adapter": {"name": id}}, {"model": BASE, "adapter": {"mix": [{"name": id, "weight": 1.0}]}}]
        asked += [("POST", path, body | name | stream, "application/json", {}) for name in naming for stream in ({}, {"stream": True})]
        asked += [("POST", chat, talk | name, "application/json", {}) for name in naming]
        asked += [("POST", "/adapters/train", train("of-bob", init_from=id, dataset=[{"prompt": "x"}]), "application/json", {}),
                  ("POST", "/adapters/train", train("of-bob", training_file=id), "application/json", {}),
                  ("POST", "/adapters/train", train("of-bob", dataset=[{"prompt": "x"}], validation_file=id), "application/json", {}),
                  ("POST", "/v1/fine_tuning/jobs", {"model": BASE, "training_file": id}, "application/json", {}),
                  ("POST", "/v1/fine_tuning/jobs", {"model": id, "training_file": id}, "application/json", {})]
    # Names and keys that ann has are free for bob.
    for name in ("mine", "trained", "reserved"):
        asked.append(("POST", "/adapters", {"name": name, "numbers": [0.5] * 13}, "application/json", {"idempotency-key": "anns-0"} if name == "mine" else {}))
        asked.append(("GET", f"/adapters/{name}/generations", None, "application/json", {}))
        asked.append(("POST", f"/adapters/{name}/rollback", {"generation": ids["generation"]}, "application/json", {}))
        asked.append(("DELETE", f"/adapters/{name}", None, "application/json", {}))
    asked.append(("GET", "/usage", None, "application/json", {}))
    return asked


def as_seen(answer) -> tuple:
    """An answer without what no two answers share: request ids, times, and in those that made something the new ids."""
    headers = {name: value for name, value in answer.headers.items() if name not in ("date", "x-request-id", "openai-processing-ms")}
    body = answer.body.decode(errors="replace")
    if answer.status < 300:
        body = re.sub(r'"(created|created_at)":\d+', r'"\1":0', re.sub(r"\b(adapter|file|ftjob|cmpl|chatcmpl)-[0-9a-f]{16,}", r"\1", body))
        headers.pop("content-length", None)
    return answer.status, headers, body
