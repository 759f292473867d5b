"""Interleaved rounds: every case once a round, in an order that turns, forwards and backwards, so that a slow minute hits all of them alike."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

from .machine import IDLE_SHARE, Watch


@dataclass
class Case:
    """One cell of a table. `run(round)` does the work and returns (value, details); `pids` are the servers it uses."""

    key: str
    run: Callable[[int], tuple[float, dict]]
    pids: list[int] = field(default_factory=list)


@dataclass
class Results:
    """Every value of every case, by key, in the order of the rounds: what the report reads and the JSON holds."""

    values: dict[str, list[float]] = field(default_factory=dict)
    details: dict[str, list[dict]] = field(default_factory=dict)
    facts: dict[str, object] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def median(self, key: str) -> float | None:
        """The median of a case, or None when it was not measured."""
        return statistics.median(self.values[key]) if self.values.get(key) else None

    def ratio(self, ours: str, theirs: str) -> tuple[float, float, float] | None:
        """(median, least, greatest) of the ratios within rounds, or of medians when the rounds do not pair up."""
        a, b = self.values.get(ours), self.values.get(theirs)
        if not a or not b:
            return None
        if len(a) != len(b):
            ratio = statistics.median(a) / statistics.median(b)
            return ratio, ratio, ratio
        ratios = [x / y for x, y in zip(a, b)]
        return statistics.median(ratios), min(ratios), max(ratios)

    def disturbed(self, key: str) -> bool:
        """Whether others used the machine before or during any round of a case."""
        return any(detail.get("disturbed") for detail in self.details.get(key, []))

    def best(self, keys: list[str]) -> str | None:
        """The key with the greatest median among those measured."""
        measured = [key for key in keys if self.values.get(key)]
        return max(measured, key=lambda key: self.median(key), default=None)


def _measure(case: Case, number: int, watch: Watch) -> tuple[float, dict]:
    """One measurement, taken again while others disturb it and tries are left; the least disturbed one."""
    best: tuple[float, dict] | None = None
    for _ in range(watch.tries):
        before = watch.before()
        with watch.during(case.pids) as span:
            value, details = case.run(number)
        # Who was busy just before may have been so in the first part of it too, too little of it to show in the whole.
        disturbance = max(before, span.disturbance)
        figures = {"others_before": before, **span.figures, "disturbed": disturbance > IDLE_SHARE, **details}
        if best is None or disturbance < least:
            best, least = (value, figures), disturbance
        if least <= IDLE_SHARE:
            break
    figures = best[1]
    if figures["disturbed"]:
        during = f"others took {figures['foreign_cpu']:.0%}, the host stole {figures['stolen_cpu']:.0%}"
        watch.warn(f"at {case.key}: before it others took {figures['others_before']:.0%}, during it {during}")
    return best


def in_turn(cases: list, number: int) -> list:
    """The cases in the order of a round: it turns, forwards and backwards, so that none follows another more often than it is followed."""
    turn = number // 2 % max(1, len(cases))
    order = [*cases[turn:], *cases[:turn]]
    return order[::-1] if number % 2 else order


def interleave(group: str, cases: list[Case], rounds: int, watch: Watch, results: Results) -> None:
    """Runs all cases `rounds` times, one at a time. A case that fails is dropped and its reason kept."""
    print(f"== {group}: {len(cases)} cases, {rounds} rounds", flush=True)
    alive = list(cases)
    for number in range(rounds):
        for case in in_turn(alive, number):
            try:
                value, details = _measure(case, number, watch)
            except Exception as error:  # one peer's failure must not end the others' run; it is reported
                results.failures[case.key] = f"{type(error).__name__}: {error}"
                results.values.pop(case.key, None)
                results.details.pop(case.key, None)
                alive = [other for other in alive if other is not case]
                print(f"  {case.key:44} FAILED {error}", flush=True)
                continue
            results.values.setdefault(case.key, []).append(value)
            results.details.setdefault(case.key, []).append(details)
            print(f"  {case.key:44} {value:10.1f}  others {details['foreign_cpu']:.0%}", flush=True)
