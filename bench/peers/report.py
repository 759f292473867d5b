"""The targets, and the tables: ours, the best peer, the ratio within rounds, whether the target is met."""

import fnmatch
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from .rounds import Results


@dataclass(frozen=True)
class Target:
    """A row. `ours` and `theirs` are patterns of case keys; the fastest case of each side is taken.

    `most`: the value itself is held against the target and must not exceed it (memory); `least`: must reach it (rates).
    Otherwise the ratio ours / theirs must reach it.
    """

    title: str
    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    target: float | None
    stretch: float | None = None
    unit: str = "tok/s"
    kind: str = "ratio"


PEERS = ("llama", "PEFT", "torch", "mistral.rs")


def _peers(group: str, kind: str) -> tuple[str, ...]:
    return tuple(f"{group}/{peer}*/{kind}" for peer in PEERS)


TARGETS = (
    Target("32 clients, 32 adapters, served", ("served32/mote/own",), _peers("served32", "own"), 10, 15),
    Target("each its own / base, ours, 32 clients", ("served32/mote/own",), ("served32/mote/base",), 0.97, 0.99),
    Target("each its own / base, ours, 64 clients", ("served64/mote/own",), ("served64/mote/base",), 0.97, 0.99),
    Target("each its own / base, the best peer, 32 clients", _peers("served32", "own"), _peers("served32", "base"), None),
    Target("base at --rank 2 / --rank 0, ours, 32 clients", ("served32/mote/base",), ("served32/mote rank 0/base",), 0.97, 0.99),
    Target("1,000 / 1 adapters resident, 32 clients", ("resident/mote 1000/own",), ("resident/mote 1/own",), 0.97, 0.99),
    Target("1,000,000 / 1 adapters resident, 32 clients", ("resident/mote 1000000/own",), ("resident/mote 1/own",), 0.97, 0.99),
    Target("base, 32 clients, served", ("served32/mote/base",), _peers("served32", "base"), 2.5, 3.5),
    Target("base, 64 clients, served", ("served64/mote/base",), _peers("served64", "base"), None),
    Target("one adapter for all, 32 clients, served", ("served32/mote/one",), _peers("served32", "one"), None),
    Target("64 clients, 64 adapters, served", ("served64/mote/own",), _peers("served64", "own"), None),
    Target("decode, batch 1, forward pass alone", ("decode1/mote*/tool",), _peers("decode1", "tool"), 1.5, 1.9),
    Target("decode, batch 1, streamed over HTTP", ("decode1/mote*/http",), _peers("decode1", "http"), None),
    Target("prefill pp512, forward pass alone", ("pp512/mote/tool",), _peers("pp512", "tool"), 2, 2.5),
    Target("prefill pp512, over HTTP", ("pp512/mote/http",), _peers("pp512", "http"), None),
    Target("batch 32 at context 512, forward pass alone", ("context512/mote/tool",), _peers("context512", "tool"), 2.5, 4),
    Target("batch 32 at context 512, ours over HTTP", ("context512/mote/http",), _peers("context512", "tool"), None),
    Target("memory of 1,000,000 adapters of 26 bytes", ("memory/mote 1000000/mb",), (), 300, 150, "MB", "most"),
    Target("upload, one connection", ("upload/mote/single",), (), 5_000, None, "/s", "least"),
    Target("upload, batch route", ("upload/mote/batch",), (), 100_000, 200_000, "/s", "least"),
    Target("first token under a just-uploaded adapter, extra", ("first/mote/extra_ms",), (), None, None, "ms", "least"),
)


def _matching(results: Results, patterns: tuple[str, ...]) -> str | None:
    return results.best([key for key in results.values if any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)])


def _met(row: Target, figure: float) -> str:
    if row.target is None:
        return ""
    reached = [bound for bound in (row.target, row.stretch) if bound is not None and (figure <= bound if row.kind == "most" else figure >= bound)]
    return ("no", "yes", "stretch")[len(reached)]


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def target_rows(results: Results) -> list[dict]:
    """The targets table as plain dicts; rows without a measurement of ours say so."""
    rows = []
    for row in TARGETS:
        ours = _matching(results, row.ours)
        made = {"row": row.title, "unit": row.unit, "target": row.target, "stretch": row.stretch, "kind": row.kind, "ours": None, "met": "not measured"}
        rows.append(made)
        if ours is None:
            continue
        made |= {"ours_case": ours, "ours": results.median(ours), "met": "", "disturbed": results.disturbed(ours)}
        if row.kind != "ratio":
            made["met"] = _met(row, made["ours"])
            continue
        # A peer's ratio to its own base: the same server's, not the best of each.
        patterns = (ours.rsplit("/", 1)[0] + "/base",) if ours.split("/")[1].startswith(PEERS) else row.theirs
        theirs = _matching(results, patterns)
        if theirs is None:
            made["met"] = "no peer measured"
            continue
        ratio, low, high = results.ratio(ours, theirs)
        made |= {"theirs_case": theirs, "theirs": results.median(theirs), "ratio": ratio, "ratio_range": [low, high], "met": _met(row, ratio)}
        made["disturbed"] = made["disturbed"] or results.disturbed(theirs)
    return rows


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def _targets_table(rows: list[dict]) -> str:
    made = []
    for row in rows:
        value = "-" if row["ours"] is None else f"{_short(row['ours'])} {row['unit']}"
        peer = f"{_short(row['theirs'])} ({row['theirs_case'].split('/')[1]})" if "theirs" in row else ""
        ratio = f"{row['ratio']:.2f} ({row['ratio_range'][0]:.2f}..{row['ratio_range'][1]:.2f})" if "ratio" in row else ""
        goal = "" if row["target"] is None else f"{_short(row['target'])}" + (f" / {_short(row['stretch'])}" if row["stretch"] else "")
        met = f"NOT TRUSTED ({row['met'] or '-'})" if row.get("disturbed") else row["met"]
        made.append([row["row"], value, peer, ratio, goal, met])
    return _table(["", "ours", "compared with", "ratio (least..greatest of a round)", "target / stretch", "met"], made)


def _figures_table(results: Results) -> str:
    rows = []
    for key in sorted(results.values):
        values = results.values[key]
        others = max(detail["foreign_cpu"] + detail["stolen_cpu"] for detail in results.details[key])
        rows.append([*key.split("/"), _short(statistics.median(values)), f"{_short(min(values))}..{_short(max(values))}", str(len(values)), f"{others:.0%}"])
    return _table(["group", "server", "case", "median", "range", "rounds", "most others took"], rows)


def _latency_table(results: Results) -> str:
    names = ["first_ms_p50", "first_ms_p99", "between_ms_p50", "between_ms_p99"]
    rows = []
    for key in sorted(key for key in results.values if key.startswith("streamed")):
        figures = [statistics.median(detail[name] for detail in results.details[key]) for name in names]
        rows.append([*key.split("/"), *map(_short, figures)])
    return _table(["group", "server", "case", "first token ms p50", "p99", "between tokens ms p50", "p99"], rows) if rows else ""


def _memory_table(results: Results) -> str:
    rows = [[name, _short(m["at_start_mb"]), _short(m["peak_mb"])] for name, m in results.facts.get("memory", {}).items()]
    return _table(["server", "resident after start, MiB", "peak, MiB"], rows) if rows else ""


def _quality_table(results: Results) -> str:
    formats = results.facts.get("quality", {}).get("formats", {})
    rows = [[name, f"{q['kl_mean']:.6f} +- {q['kl_error']:.6f}", f"{q['top1_agreement']:.4f}", f"{q['perplexity']:.4f}"] for name, q in formats.items()]
    return _table(["llama.cpp", "KL to F32, nats", "top-1 agreement", "perplexity"], rows) if rows else ""


def markdown(results: Results, warnings: list[str]) -> str:
    """Everything for a person, as Markdown."""
    parts = []
    measured = sum("others_before" in detail for details in results.details.values() for detail in details)
    if warnings:
        parts.append(
            f"**The machine was NOT idle in {len(warnings)} of {measured} measurements: rows marked so are not to be trusted.** "
            "llama.cpp's threads spin on barriers, so that a busy neighbour costs it far more than its share. "
            f"First: {warnings[0]}."
        )
    elif measured:
        parts.append(f"The machine was idle before and during each of {measured} measurements.")
    parts.append(_targets_table(target_rows(results)))
    parts.append("The peer of a row is the fastest of all peers and formats measured, whatever its precision.")
    parts += [part for part in (_quality_table(results), _latency_table(results), _memory_table(results)) if part]
    parts.append(_figures_table(results))
    if results.failures:
        parts.append("Left out:\n" + "\n".join(f"- {key}: {reason.splitlines()[0]}" for key, reason in results.failures.items()))
    return "\n\n".join(parts) + "\n"


def write(results: Results, warnings: list[str], settings: dict, out: Path) -> None:
    """`out` (JSON: every value of every round, settings, machine) and the same name with .md."""
    out.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "settings": settings,
        "idle": not warnings,
        "not_idle": warnings,
        "targets": target_rows(results),
        "facts": results.facts,
        "failures": results.failures,
        "cases": {key: {"median": results.median(key), "values": values, "rounds": results.details[key]} for key, values in results.values.items()},
    }
    out.write_text(json.dumps(document, indent=1, default=str) + "\n")
    out.with_suffix(".md").write_text(markdown(results, warnings))
