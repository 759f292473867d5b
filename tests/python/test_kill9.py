"""A few rounds of the kill test; by hand it runs two hundred."""

import pathlib
import subprocess
import sys

from conftest import BIN


def test_nothing_acknowledged_is_lost():
    script = pathlib.Path(__file__).with_name("kill9.py")
    subprocess.run([sys.executable, script, "--kills", "4", "--bin", BIN], check=True, timeout=600)
