"""Kills a server with -9 at random moments under write load, and looks in its database for what it had acknowledged.

    python3 tests/python/kill9.py --kills 200 --bin target/release/mote

Nothing here uses mote's own code: the checker reads the file with Python's sqlite3. After every kill:

- the database passes SQLite's integrity and foreign key checks;
- every acknowledged adapter, generation, deletion, key, revocation, job and cancellation is there, byte by byte;
- what was under way and not acknowledged is there as a whole or not at all;
- no adapter is without its current generation, no generation without its adapter and its facts, no job without its data.

The next round serves the same directory again and must accept the keys made before.
"""

import argparse
import base64
import http.client
import json
import os
import pathlib
import random
import re
import signal
import sqlite3
import struct
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
ADMIN_KEY = "admin-key-of-the-kill-test"
ACTIVE = ("validating", "queued", "running", "paused")


class Journal:
    """What the server has acknowledged, and what it may have done. Each name is one writer's, so its operations have an order."""

    def __init__(self):
        self.lock = threading.Lock()
        self.adapters = {}  # name -> bytes, or None when deleted
        self.pending = {}  # name -> bytes or None of the one operation that was not answered
        self.keys = {}  # id -> (secret, revoked)
        self.jobs = {}  # id -> (name, cancelled)
        self.revoking = set()
        self.cancelling = set()

    def begin(self, name, data):
        with self.lock:
            self.pending[name] = data

    def acknowledge(self, name, data):
        with self.lock:
            self.adapters[name] = data
            self.pending.pop(name, None)

    def refused(self, name):
        with self.lock:
            self.pending.pop(name, None)


class Server:
    def __init__(self, binary, data):
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [binary, "serve", "--listen", "127.0.0.1:0", "--device", "cpu", "--threads", "1", "--dtype", "f32",
             "--model", str(ROOT / "tests/fixtures/golden/llama/model"), "--model-id", "tiny", "--data-dir", data,
             "--train-queue-per-tenant", "100000", "--train-queue", "1000000", "--train-jobs-per-tenant", "1", "--train-max-steps", "1000000",
             # The checker shows every key that was revoked, from one address.
             "--auth-failures-per-minute", "0"],
            stdout=subprocess.DEVNULL, stderr=self.log, env={**os.environ, "MOTE_ADMIN_KEY": ADMIN_KEY},
        )

    def text(self):
        self.log.seek(0)
        return self.log.read()

    def address(self):
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            found = re.search(r"listening on http://127\.0\.0\.1:(\d+)", self.text())
            if found:
                return int(found.group(1))
            if self.process.poll() is not None:
                raise SystemExit(f"the server ended with {self.process.returncode}:\n{self.text()}")
            time.sleep(0.02)
        raise SystemExit(f"the server did not start:\n{self.text()}")

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.log.close()


class Client:
    """One connection; None instead of an answer when the server is gone."""

    def __init__(self, port):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def call(self, method, path, body=None, key=ADMIN_KEY, kind="application/json"):
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        headers = {"authorization": f"Bearer {key}"} | ({"content-type": kind} if data is not None else {})
        try:
            self.connection.request(method, path, data, headers)
            answer = self.connection.getresponse()
            text = answer.read()
            return answer.status, (json.loads(text) if text and kind == "application/json" else text)
        except (OSError, http.client.HTTPException, ValueError):
            return None


def bf16(rng):
    """26 bytes: 13 finite numbers."""
    return b"".join(struct.pack("<f", rng.uniform(-1, 1))[2:] for _ in range(13))


def adapters(client, journal, rng, prefix, stop):
    """Uploads, replaces and deletes under names of its own, one request after the other."""
    names = []
    turn = 0
    while not stop.is_set():
        turn += 1
        choice = rng.random()
        if choice < 0.2 and names:
            name = rng.choice(names)
            journal.begin(name, None)
            answer = client.call("DELETE", f"/adapters/{name}")
            if answer is None:
                return
            assert answer[0] == 204, answer
            names.remove(name)
            journal.acknowledge(name, None)
            continue
        new = not names or choice < 0.6
        name, data = (f"{prefix}-{turn}" if new else rng.choice(names)), bf16(rng)
        journal.begin(name, data)
        body = {"name": name, "data": base64.b64encode(data).decode(), "on_conflict": "new_generation"}
        answer = client.call("POST", "/adapters", body)
        if answer is None:
            return
        assert answer[0] in (200, 201), answer
        journal.acknowledge(name, data)
        if new:
            names.append(name)


def batches(client, journal, rng, prefix, stop):
    """Many adapters in a request; an adapter counts when its line was answered. A batch that was cut off has no answer here."""
    turn = 0
    while not stop.is_set():
        turn += 1
        items = {f"{prefix}-{turn}-{i}": bf16(rng) for i in range(rng.choice([1, 40, 400]))}
        for name, data in items.items():
            journal.begin(name, data)
        lines = b"\n".join(json.dumps({"name": n, "data": base64.b64encode(d).decode()}).encode() for n, d in items.items())
        answer = client.call("POST", "/adapters/batch", lines, kind="application/x-ndjson")
        if answer is None:
            return
        assert answer[0] == 200, answer
        for line in answer[1].splitlines():
            line = json.loads(line)
            assert "generation" in line, line
            journal.acknowledge(line["name"], items[line["name"]])


def keys(client, journal, rng, _prefix, stop):
    while not stop.is_set():
        answer = client.call("POST", "/admin/tenants/default/keys", {"role": "member"})
        if answer is None:
            return
        assert answer[0] in (200, 201), answer
        with journal.lock:
            journal.keys[answer[1]["id"]] = (answer[1]["key"], False)
        if rng.random() < 0.4:
            key = answer[1]["id"]
            with journal.lock:
                journal.revoking.add(key)
            gone = client.call("DELETE", f"/admin/keys/{key}")
            if gone is None:
                return
            assert gone[0] in (200, 204), gone
            with journal.lock:
                journal.keys[key] = (journal.keys[key][0], True)
        time.sleep(rng.random() * 0.02)


def jobs(client, journal, rng, prefix, stop):
    turn = 0
    while not stop.is_set():
        turn += 1
        name = f"{prefix}-{turn}"
        body = {
            "name": name, "method": "grpo", "dataset": [{"prompt": "Once", "answer": "e"}, {"prompt": "The fox", "answer": "e"}],
            "grader": {"type": "string_check", "input": "{{sample.output_text}}", "reference": "{{item.answer}}", "operation": "like"},
            "hyperparameters": {"steps": 1000000, "prompts_per_step": 2, "samples_per_prompt": 2, "max_completion_tokens": 4, "flat_reward_steps": 0},
        }
        answer = client.call("POST", "/adapters/train", body)
        if answer is None:
            return
        assert answer[0] in (200, 202), answer
        job = answer[1]["id"]
        with journal.lock:
            journal.jobs[job] = (name, False)
        if rng.random() < 0.7:
            with journal.lock:
                journal.cancelling.add(job)
            cancelled = client.call("POST", f"/adapters/train/{job}/cancel")
            if cancelled is None:
                return
            assert cancelled[0] == 200, cancelled
            with journal.lock:
                journal.jobs[job] = (name, True)
        time.sleep(rng.random() * 0.05)


class Checker:
    """Reads the database of a dead server."""

    def __init__(self, data, journal):
        self.db = sqlite3.connect(os.path.join(data, "mote.db"))
        self.journal = journal
        self.wrong = []

    def expect(self, true, words):
        if not true:
            self.wrong.append(words)

    def all(self):
        self.soundness()
        self.adapters()
        self.keys()
        self.jobs()
        self.db.close()
        return self.wrong

    def rows(self, sql, *values):
        return self.db.execute(sql, values).fetchall()

    def soundness(self):
        self.expect(self.rows("PRAGMA integrity_check") == [("ok",)], "the database is not sound")
        self.expect(self.rows("PRAGMA foreign_key_check") == [], "a row points at nothing")
        for words, sql in {
            "adapters without their current generation":
                "SELECT a.name FROM adapters a LEFT JOIN generations g ON g.adapter = a.id AND g.seq = a.seq WHERE a.deleted = 0 AND g.data IS NULL",
            "generations of deleted adapters": "SELECT a.name FROM adapters a JOIN generations g ON g.adapter = a.id WHERE a.deleted = 1",
            "generations that are not 26 bytes with a hash of 16": "SELECT adapter FROM generations WHERE length(data) <> 26 OR length(generation) <> 16",
            "generations whose facts are missing": "SELECT g.adapter FROM generations g LEFT JOIN facts f ON f.id = g.facts WHERE f.id IS NULL",
            "changes beyond the counter": "SELECT name FROM adapters WHERE change_seq > (SELECT value FROM counter)",
            "active jobs without data":
                f"SELECT j.id FROM jobs j LEFT JOIN job_data d ON d.job = j.id WHERE j.status IN {ACTIVE} AND d.data IS NULL",
            "ended jobs that kept their data": f"SELECT j.id FROM jobs j JOIN job_data d ON d.job = j.id WHERE j.status NOT IN {ACTIVE}",
            "gaps in events": "SELECT job FROM job_events GROUP BY job HAVING COUNT(*) <> MAX(seq)",
            "jobs whose events are miscounted":
                "SELECT id FROM jobs j WHERE events <> (SELECT COUNT(*) FROM job_events e WHERE e.job = j.id)",
        }.items():
            found = self.rows(sql)
            self.expect(not found, f"{words}: {found[:3]}")

    def adapters(self):
        found = {
            name: bytes(data)
            for name, data in self.rows(
                "SELECT a.name, g.data FROM adapters a JOIN generations g ON g.adapter = a.id AND g.seq = a.seq WHERE a.deleted = 0"
            )
        }
        journal = self.journal
        for name, data in journal.adapters.items():
            may = [data] + ([journal.pending[name]] if name in journal.pending else [])
            self.expect(found.get(name) in may, f"adapter {name} is {found.get(name)}, acknowledged {data}")
        for name, data in found.items():
            if name not in journal.adapters:
                self.expect(data == journal.pending.get(name), f"adapter {name} is nobody's")
        # What is there now is what later rounds are measured against.
        for name in set(journal.pending) | set(journal.adapters):
            if name in found or name in journal.adapters:
                journal.adapters[name] = found.get(name)
        journal.pending.clear()

    def keys(self):
        found = {
            row[0]: row[1:] for row in self.rows("SELECT id, hash, prefix, revoked_at, role FROM keys")
        }
        for key, (secret, revoked) in self.journal.keys.items():
            if key not in found:
                self.wrong.append(f"key {key} is lost")
                continue
            digest, prefix, revoked_at, role = found[key]
            self.expect(len(digest) == 32, f"key {key} has half a hash")
            self.expect(secret.startswith(prefix) and role == "member", f"key {key} is half written")
            self.expect(not revoked or revoked_at is not None, f"key {key} is valid again")
            if revoked_at is not None and not revoked:
                self.expect(key in self.journal.revoking, f"key {key} was revoked by nobody")
                self.journal.keys[key] = (secret, True)

    def jobs(self):
        found = {row[0]: row[1:] for row in self.rows("SELECT id, name, status, spec, step FROM jobs")}
        for job, (name, cancelled) in self.journal.jobs.items():
            if job not in found:
                self.wrong.append(f"job {job} is lost")
                continue
            stored, status, spec, _step = found[job]
            self.expect(stored == name and isinstance(json.loads(spec), dict), f"job {job} is half written")
            self.expect(not cancelled or status == "cancelled", f"job {job} is {status}, cancelled")
            self.expect(status in ACTIVE + ("cancelled",), f"job {job} is {status}")
            if status == "cancelled" and not cancelled:
                self.expect(job in self.journal.cancelling, f"job {job} was cancelled by nobody")
                self.journal.jobs[job] = (name, True)


def keys_work(port, journal, rng, most=5):
    """Some of the keys of earlier rounds, at the running server: what their hashes are made of is its own affair."""
    client, wrong = Client(port), []
    for key, (secret, revoked) in rng.sample(sorted(journal.keys.items()), min(most, len(journal.keys))):
        answer = client.call("GET", "/v1/models", key=secret)
        if answer is not None and answer[0] != (401 if revoked else 200):
            wrong.append(f"key {key} (revoked: {revoked}) is answered {answer[0]}")
    return wrong


def one_round(binary, data, journal, rng, number):
    server = Server(binary, data)
    if rng.random() < 0.1:
        # Also while it starts.
        time.sleep(rng.uniform(0.0, 0.4))
        server.kill()
        return []
    port = server.address()
    wrong = keys_work(port, journal, rng)
    stop, broken, writers = threading.Event(), [], []

    def run(work, prefix, seed):
        try:
            work(Client(port), journal, random.Random(seed), prefix, stop)
        except AssertionError as error:
            broken.append(f"{work.__name__}: {error}")

    for index, work in enumerate([adapters] * 5 + [batches] * 2 + [keys, jobs]):
        args = (work, f"r{number}w{index}", rng.random())
        writers.append(threading.Thread(target=run, args=args, daemon=True))
    for writer in writers:
        writer.start()
    time.sleep(rng.uniform(0.02, 1.2))
    server.kill()
    stop.set()
    for writer in writers:
        writer.join(timeout=60)
    return wrong + broken


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--bin", default=os.environ.get("MOTE_BIN", str(ROOT / "target/debug/mote")))
    args = parser.parse_args()
    seed = args.seed if args.seed is not None else random.randrange(1 << 30)
    print(f"seed {seed}", flush=True)
    rng, journal = random.Random(seed), Journal()
    with tempfile.TemporaryDirectory() as data:
        for number in range(args.kills):
            wrong = one_round(args.bin, data, journal, rng, number)
            if os.path.exists(os.path.join(data, "mote.db")):
                try:
                    wrong += Checker(data, journal).all()
                except sqlite3.OperationalError as error:
                    # A kill before the first migration leaves an empty file.
                    if journal.adapters or journal.keys or journal.jobs or "no such table" not in str(error):
                        raise
            if wrong:
                print(f"kill {number + 1}:", *wrong[:20], sep="\n  ")
                return 1
        server = Server(args.bin, data)
        wrong = keys_work(server.address(), journal, rng, most=1000)
        server.kill()
        if wrong:
            print("after all kills:", *wrong[:20], sep="\n  ")
            return 1
        live = sum(data is not None for data in journal.adapters.values())
        print(
            f"{args.kills} kills: {len(journal.adapters)} adapters ({live} live), {len(journal.keys)} keys, "
            f"{len(journal.jobs)} jobs acknowledged; none lost, none half-written"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
