"""What the processor does: is the machine idle, who used it during a measurement, how much memory a process had."""

import os
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
IDLE_SHARE = 0.05  # of all cores: more than this used by others, and the machine is not idle


def _cpu_ticks() -> tuple[float, float, float]:
    """(busy, stolen, all) ticks of all cores since boot, from the first line of /proc/stat."""
    user, nice, system, idle, iowait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9])
    busy = user + nice + system + irq + softirq
    return busy, steal, busy + idle + iowait + steal


def process_seconds(pid: int) -> float:
    """CPU seconds of a process, all its threads (its children are not counted)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def memory_mb(pid: int) -> dict[str, float]:
    """Peak and present resident memory of a process in MiB (VmHWM, VmRSS)."""
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmHWM", "VmRSS"):
            found[name] = round(int(value.split()[0]) / 1024, 1)
    return {"peak_mb": found["VmHWM"], "resident_mb": found["VmRSS"]}


@dataclass
class Watch:
    """Looks at the processor around each measurement and remembers when others were using it.

    `max_wait_s`: how long to wait for an idle machine before measuring all the same (and saying so). `tries`: how often a
    measurement that was disturbed is taken again; the least disturbed one counts.
    """

    max_wait_s: float = 0.0
    tries: int = 1
    warnings: list[str] = field(default_factory=list)

    def before(self) -> float:
        """Share of all cores that others use, over a second in which we do nothing; waits for an idle one if allowed to."""
        deadline = time.monotonic() + self.max_wait_s
        while True:
            busy0, steal0, all0 = _cpu_ticks()
            time.sleep(1.0)
            busy1, steal1, all1 = _cpu_ticks()
            share = (busy1 - busy0 + steal1 - steal0) / max(1, all1 - all0)
            if share <= IDLE_SHARE or time.monotonic() >= deadline:
                return round(share, 4)

    def during(self, pids: list[int]) -> "Span":
        """Context manager: how much of the processor others took while `pids` and this process worked."""
        return Span([os.getpid(), *pids])

    def warn(self, text: str) -> None:
        """Says loudly that a measurement is not to be trusted, and remembers it."""
        self.warnings.append(text)
        print(f"  !! NOT IDLE {text}", flush=True)


class Span:
    """CPU accounting over a measurement; read `figures` after the `with` block."""

    def __init__(self, pids: list[int]):
        self.pids = pids
        self.figures: dict[str, float] = {}
        self.disturbance = 0.0

    def __enter__(self) -> "Span":
        self.ticks = _cpu_ticks()
        self.ours = self._seconds()
        return self

    def _seconds(self) -> list[float]:
        """CPU seconds of this process, of each pid, and of the child processes that ended."""
        ended = os.times()
        return [*(process_seconds(pid) for pid in self.pids), ended.children_user + ended.children_system]

    def __exit__(self, *exc) -> None:
        if exc[0] is not None:
            return
        busy, steal, total = (now - then for now, then in zip(_cpu_ticks(), self.ticks))
        ours = [now - then for now, then in zip(self._seconds(), self.ours)]
        total = max(total, 1)
        foreign = max(0.0, busy - sum(ours) * TICKS) / total
        self.disturbance = foreign + steal / total
        self.figures = {
            "client_cpu": round(ours[0] * TICKS / total, 4),
            "server_cpu": round(sum(ours[1:]) * TICKS / total, 4),
            "foreign_cpu": round(foreign, 4),
            "stolen_cpu": round(steal / total, 4),
        }


def describe() -> dict:
    """The machine in facts that change speed."""
    info = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        info.setdefault(name.strip(), value.strip())
    wanted = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
    flags = set(info.get("flags", info.get("Features", "")).split())
    memory = next(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    return {
        "processor": info.get("model name", platform.machine()),
        "family_model": f"{info.get('cpu family', '?')}/{info.get('model', '?')}",
        "cores": len(os.sched_getaffinity(0)),
        "instructions": [flag for flag in wanted if flag in flags],
        "memory_gib": round(memory / 2**20, 1),
        "kernel": platform.release(),
        "load_at_start": os.getloadavg(),
    }
