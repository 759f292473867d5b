"""A quarter of a minute of the soak; by hand it runs for hours."""

import pathlib
import subprocess
import sys

from conftest import BIN


def test_a_short_soak_finds_nothing():
    script = pathlib.Path(__file__).with_name("soak.py")
    subprocess.run([sys.executable, script, "--minutes", "0.25", "--clients", "30", "--mote", BIN], check=True, timeout=600)
