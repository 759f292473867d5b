"""schemathesis against the running server: whatever the schema allows, and much that it does not, never gives a 5xx."""

import os
import pathlib
import subprocess
import sys

from conftest import ADMIN_KEY


def test_no_server_errors(fuzzed):
    command = [
        str(pathlib.Path(sys.executable).with_name("schemathesis")), "run", f"{fuzzed.url}/openapi.json",
        "--header", f"Authorization: Bearer {ADMIN_KEY}",
        "--checks", "not_a_server_error",
        "--phases", "examples,coverage,fuzzing",
        "--mode", "all",
        "--max-examples", os.environ.get("SCHEMATHESIS_EXAMPLES", "40"),
        "--seed", "1",
        "--request-timeout", "20",
        "--no-color",
    ]
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": str(pathlib.Path(__file__).parent)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment)
    print(result.stdout[-4000:])
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert fuzzed.process.poll() is None
