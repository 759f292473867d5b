"""Servers for the client tests: the tiny golden model, and the real one, each on a free loopback port."""

import os
import pathlib
import re
import subprocess
import tempfile
import time
import urllib.request

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN = os.environ.get("MOTE_BIN", str(ROOT / "target/debug/mote"))
GOLDEN = ROOT / "tests/fixtures/golden"
TINY = ("--model", str(GOLDEN / "llama/model"), "--model-id", "tiny", "--dtype", "f32")
ADMIN_KEY = "admin-key-of-the-client-tests"


class Server:
    """A `mote serve` of its own data directory; `url` is where it answers."""

    def __init__(self, *args: str):
        self.data = tempfile.TemporaryDirectory()
        self.log = open(os.path.join(self.data.name, "log"), "w+", encoding="utf-8")
        self.process = subprocess.Popen(
            [BIN, "serve", "--listen", "127.0.0.1:0", "--data-dir", self.data.name, *args],
            stdout=subprocess.DEVNULL, stderr=self.log, env={**os.environ, "MOTE_ADMIN_KEY": ADMIN_KEY},
        )
        self.url = self._wait()

    def _wait(self) -> str:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            text = pathlib.Path(self.log.name).read_text(encoding="utf-8")
            found = re.search(r"http://127\.0\.0\.1:\d+", text)
            if found:
                try:
                    urllib.request.urlopen(found.group() + "/readyz").read()
                    return found.group()
                except OSError:
                    pass
            if self.process.poll() is not None:
                raise RuntimeError(f"mote serve ended with {self.process.returncode}:\n{text}")
            time.sleep(0.1)
        raise RuntimeError("mote serve was not ready in time")

    def stop(self) -> int:
        self.process.terminate()
        code = self.process.wait(timeout=60)
        self.log.close()
        self.data.cleanup()
        return code


def serve(*args: str):
    server = Server(*args)
    yield server
    assert server.stop() == 0, "SIGTERM must end the server with 0"


@pytest.fixture(scope="session")
def tiny():
    """The golden Llama model, with keys."""
    yield from serve(*TINY)


@pytest.fixture
def fuzzed():
    """A golden model for one test alone: whoever sends anything at all with an admin's key may also limit the tenant of the other tests."""
    yield from serve(*TINY)


@pytest.fixture(scope="session")
def real():
    """SmolLM2-135M-Instruct, without keys; in f32, where its text is that of transformers: in 8 bits close calls may fall otherwise."""
    yield from serve("--no-auth", "--dtype", "f32")
