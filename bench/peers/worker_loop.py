"""The loop of a worker process: a JSON object a line in, one out. Nothing else may write to stdout."""

import json
import os
import sys
import traceback


def serve(build, arguments: list[str]) -> None:
    """`build(*arguments)` gives an object with a method for each thing asked to `do`, which returns (rate, details)."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries log to stdout: to the log with it
    try:
        worker = build(*arguments)
        out.write(json.dumps({"ready": True}) + "\n")
        for line in sys.stdin:
            ask = json.loads(line)
            rate, details = getattr(worker, ask.pop("do"))(**ask)
            out.write(json.dumps({"rate": rate, "details": details}) + "\n")
    except Exception as error:  # the parent prints it; the trace is in the log
        traceback.print_exc()
        out.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
    out.flush()
    os._exit(0)  # some runtimes hang in their own shutdown
