"""The peer runner: builds other servers, runs one load against each and ours, interleaved, and prints the ratios.

`bench/peers.py` is the entry. Rooms: `install` and `formats` make the peers and their files, `servers` starts and pauses
servers, `workers` talks to the peers that have no server here (`worker_*.py` run in their Pythons), `client` is the HTTP load, `loads` says what is measured,
`tools` wraps command line benchmarks, `machine` watches the processor, `report` holds the targets and the tables,
`quality` scores llama.cpp's formats. Standard library only: what needs packages runs in the venv as a subprocess.
"""
