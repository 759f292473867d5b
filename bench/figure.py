#!/usr/bin/env python3
"""Reinforcement learning against supervised fine-tuning, by the number of trained numbers: the paper's figure (arXiv 2602.04118) at our scale.

    cargo build --release
    python3 bench/figure.py --mote target/release/mote --out bench/results/figure

Every run is `mote train` on generated tasks (`mote task`): the same items, prompt and token limit for every arm, an adapter's numbers all that differs. Learning rates are
chosen by a sweep on items that nothing else uses, at seeds that nothing else uses. A run that has been made is not made again: stop it and start it as you like.
What a run finds does not depend on its threads or on what else the machine does, so several runs of one thread share it (`--parallel`); their cost is told in processor time.
`--plan` prints what is left. The last step writes `results.json`, `results.md` and, if matplotlib is there, `results.svg`.
"""

import argparse
import concurrent.futures
import json
import math
import os
import statistics
import subprocess
import sys
import time


def groups(count):
    """One number for each of so many groups of sites; 13 of them are the default scheme. The model has 210 sites."""
    return {"convention": "peft", "rank": 2, "u": 1, "ties": {"kind": "groups", "count": count}}


# Steps, prompts a step, completions a prompt, tokens: the size of a run.
STEPS, PROMPTS, SAMPLES, TOKENS = 30, 6, 6, 24
TRAIN, HELD_OUT = 400, 400  # held-out items: the first half chooses rates, the second half is reported
# Seeds of the sweeps, which no reported run has.
ONE, TWO = [1000], [1000, 1001]
# Which arms: (task, method, numbers, seeds reported, rates of the sweep, its seeds).
# The more sites share a number, the further a step moves them all: fewer numbers want smaller rates.
ARMS = [
    ("arithmetic", "grpo", 13, 5, [0.003, 0.01, 0.03, 0.1], TWO),
    ("arithmetic", "sft", 13, 3, [0.001, 0.003, 0.01, 0.03, 0.1], TWO),
    ("arithmetic", "es", 13, 5, [0.01, 0.03, 0.1, 0.3], TWO),
    ("only-number", "grpo", 13, 3, [0.003, 0.01, 0.03], ONE),
    ("arithmetic", "grpo", 1, 3, [0.003, 0.01, 0.03], ONE),
    ("arithmetic", "sft", 1, 3, [0.001, 0.003, 0.01], ONE),
    ("arithmetic", "grpo", 210, 3, [0.01, 0.03, 0.1], ONE),
    ("arithmetic", "sft", 210, 3, [0.003, 0.01, 0.03], ONE),
]


def hyperparameters(method, rate):
    """What a run is told beside its data."""
    settings = {"steps": STEPS, "prompts_per_step": PROMPTS, "max_completion_tokens": TOKENS, "learning_rate": rate}
    if method == "grpo":
        settings |= {"samples_per_prompt": SAMPLES}
    if method == "es":
        # What a step saves on the gradient it spends on candidates.
        settings |= {"samples_per_prompt": 1, "population": 32, "sigma": 0.1}
    return settings


class Runs:
    def __init__(self, args):
        self.args = args
        self.made = 0
        os.makedirs(args.out, exist_ok=True)
        self.work = args.work or os.path.join(args.out, "runs")
        os.makedirs(self.work, exist_ok=True)

    def task(self, task):
        """The folder of a task's data, its held-out items in two halves."""
        folder = os.path.join(self.work, task)
        if not os.path.exists(os.path.join(folder, "test.jsonl")):
            subprocess.run(
                [self.args.mote, "task", task, "--out", folder, "--train", str(TRAIN), "--validation", str(HELD_OUT)],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            with open(os.path.join(folder, "validation.jsonl")) as file:
                lines = file.readlines()
            for name, part in [("dev", lines[: HELD_OUT // 2]), ("test", lines[HELD_OUT // 2 :])]:
                with open(os.path.join(folder, name + ".jsonl"), "w") as file:
                    file.writelines(part)
        return folder

    def run(self, task, method, numbers, rate, seed, held_out):
        """One training; its report, made now or before. None when the time is up."""
        folder = self.task(task)
        name = f"{task}-{method}-{numbers}-lr{rate}-seed{seed}-{held_out}"
        out = os.path.join(self.work, name + ".bin")
        report = out + ".json"
        cost = out + ".cpu.json"  # written last
        if not os.path.exists(cost):
            if self.args.plan or time.monotonic() > self.args.until:
                self.made += 1
                return None
            command = [self.args.mote, "train", "--data", os.path.join(folder, "train.jsonl")]
            command += ["--validation", os.path.join(folder, held_out + ".jsonl"), "--method", method, "--resume"]
            command += ["--grader", "@" + os.path.join(folder, "grader.json"), "--seed", str(seed), "--out", out]
            command += ["--scheme", json.dumps(groups(numbers))]
            command += ["--samples", "4" if held_out == "test" else "1", "--log", "warn"]
            for key, value in hyperparameters(method, rate).items():
                command += ["--set", f"{key}={value}"]
            if self.args.model:
                command += ["--model", self.args.model]
            if self.args.parallel > 1:
                command += ["--threads", "1"]
            begun = time.monotonic()
            with open(out + ".log", "w+") as log:
                child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True)
                _, status, usage = os.wait4(child.pid, 0)
                child.returncode = os.waitstatus_to_exitcode(status)
                log.seek(0)
                said = log.read()
            if child.returncode != 0:
                raise RuntimeError(f"{name}: {said[-2000:]}")
            cpu = usage.ru_utime + usage.ru_stime
            with open(cost, "w") as file:
                json.dump({"cpu_seconds": cpu}, file)
            print(f"{name}: {time.monotonic() - begun:.0f} s, {cpu:.0f} of a core: {' | '.join(said.splitlines()[1:])}", flush=True)
        with open(report) as file:
            found = json.load(file)
        # A run that was interrupted and taken up again counts its last part only.
        with open(cost) as file:
            return found | json.load(file)


def chosen_rate(runs, task, method, numbers, rates, seeds):
    """The rate with the best reward on the dev items, over the seeds and both ways of sampling; the table of all."""
    rewards = {}
    for rate in rates:
        reports = [runs.run(task, method, numbers, rate, seed, "dev") for seed in seeds]
        if all(report is not None for report in reports):
            found = [report["validation"]["adapter"] for report in reports]
            rewards[rate] = statistics.fmean((part["reward"] + part["sampled"]) / 2 for part in found)
    if len(rewards) < len(rates):
        return None, rewards
    return max(rewards, key=rewards.get), rewards


def spread(values):
    """Mean and the 95 % interval of the mean over seeds (Student's t)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    t = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}[len(values)]
    return mean, t * statistics.stdev(values) / math.sqrt(len(values))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mote", default="target/release/mote", help="our binary; a release build")
    parser.add_argument("--model", help="another model than the default one")
    parser.add_argument("--out", default="bench/results/figure", help="folder of the results")
    parser.add_argument("--work", help="folder of single runs [default: runs in --out]")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no run after so many minutes")
    parser.add_argument("--parallel", type=int, default=os.cpu_count(), help="runs at a time, each of one thread; 1: one with all threads")
    parser.add_argument("--plan", action="store_true", help="say what is left, and do nothing")
    args = parser.parse_args()
    args.until = time.monotonic() + 60 * args.minutes
    runs = Runs(args)
    if not args.plan:
        make(runs, args.parallel)
    arms = []
    for task, method, numbers, seeds, rates, sweep_seeds in ARMS:
        rate, sweep = chosen_rate(runs, task, method, numbers, rates, sweep_seeds)
        reports = []
        if rate is not None:
            reports = [runs.run(task, method, numbers, rate, seed, "test") for seed in range(seeds)]
        done = [report for report in reports if report is not None]
        arms.append(
            {"task": task, "method": method, "numbers": numbers, "seeds": seeds, "rate": rate, "sweep": sweep, "sweep_seeds": len(sweep_seeds), "done": len(done)}
        )
        if not done:
            continue
        parts = [report["validation"] for report in done]
        arms[-1] |= {
            "greedy": [part["adapter"]["reward"] for part in parts],
            "sampled": [part["adapter"]["sampled"] for part in parts],
            "base_greedy": parts[0]["zero"]["reward"],
            "base_greedy_interval": parts[0]["zero"]["interval"],
            "base_sampled": statistics.fmean(part["zero"]["sampled"] for part in parts),
            "items": parts[0]["zero"]["n"],
            "intervals": [part["adapter"]["interval"] for part in parts],
            "cpu_seconds": [report["cpu_seconds"] for report in done],
            "curves": [[step.get("reward_mean") for step in report["curve"]] for report in done],
        }
    if args.plan:
        print(f"{runs.made} runs are left (rates that are not chosen yet hide more)")
        return
    write(args.out, arms)


def make(runs, parallel):
    """Makes what is missing, several runs at a time: an arm's sweep, then its seeds."""
    for task in {arm[0] for arm in ARMS}:
        runs.task(task)
    with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
        for task, method, numbers, seeds, rates, sweep_seeds in ARMS:
            sweep = [(rate, seed) for rate in rates for seed in sweep_seeds]
            list(pool.map(lambda each: runs.run(task, method, numbers, *each, "dev"), sweep))
            rate, _ = chosen_rate(runs, task, method, numbers, rates, sweep_seeds)
            if rate is not None:
                list(pool.map(lambda seed: runs.run(task, method, numbers, rate, seed, "test"), range(seeds)))


def write(out, arms):
    size = {"steps": STEPS, "prompts_per_step": PROMPTS, "samples_per_prompt": SAMPLES, "max_completion_tokens": TOKENS}
    with open(os.path.join(out, "results.json"), "w") as file:
        json.dump({"size": size, "arms": arms}, file, indent=1)
        file.write("\n")
    lines = [
        "| task | method | numbers | learning rate | seeds | base greedy | greedy | gain | base sampled | sampled | gain | s of a core a run |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in arms:
        if not arm["done"]:
            continue
        cells = [arm["task"], arm["method"], arm["numbers"], arm["rate"], f"{arm['done']} of {arm['seeds']}"]
        for way in ["greedy", "sampled"]:
            mean, half = spread(arm[way])
            base = arm["base_" + way]
            cells += [f"{base:.3f}", f"{mean:.3f}" + (f" ± {half:.3f}" if half is not None else ""), f"{mean - base:+.3f}"]
        cells.append(f"{statistics.fmean(arm['cpu_seconds']):.0f}")
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    lines += ["", "± is the 95 % interval of the mean over seeds (Student's t). Learning rates by reward on items of their own, at seeds of their own:", ""]
    lines += ["| task | method | numbers | seeds a rate | reward by learning rate (mean of greedy and sampled) |", "|---|---|---|---|---|"]
    for arm in arms:
        rates = ", ".join(f"{rate}: {reward:.3f}" for rate, reward in arm["sweep"].items())
        lines.append(f"| {arm['task']} | {arm['method']} | {arm['numbers']} | {arm['sweep_seeds']} | {rates} |")
    with open(os.path.join(out, "results.md"), "w") as file:
        file.write("\n".join(lines) + "\n")
    print("\n".join(lines))
    try:
        draw(out, arms)
    except ImportError:
        print("no matplotlib: no plot")


def draw(out, arms):
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plot

    figure, (left, right) = plot.subplots(1, 2, figsize=(11, 4.2))
    mine = [arm for arm in arms if arm["task"] == "arithmetic" and arm["done"]]
    for method, colour in [("grpo", "tab:blue"), ("sft", "tab:orange"), ("es", "tab:green")]:
        own = sorted((arm for arm in mine if arm["method"] == method), key=lambda arm: arm["numbers"])
        if own:
            points = [spread(arm["greedy"]) for arm in own]
            left.errorbar(
                [arm["numbers"] for arm in own],
                [mean for mean, _ in points],
                yerr=[half or 0 for _, half in points],
                marker="o",
                capsize=3,
                color=colour,
                label=method,
            )
        for arm in own:
            if arm["numbers"] == 13 and method != "sft":
                curves = [curve for curve in arm["curves"] if all(value is not None for value in curve)]
                mean = [statistics.fmean(step) for step in zip(*curves)]
                right.plot(range(1, len(mean) + 1), mean, color=colour, label=f"{method}, 13 numbers, mean of {len(curves)}")
    if mine:
        left.axhline(mine[0]["base_greedy"], color="grey", linestyle=":", label="base")
    left.set_xscale("log")
    left.set_xticks([1, 13, 210], ["1", "13", "210"])
    left.set_xlabel("numbers")
    left.set_ylabel("greedy reward, held out")
    left.legend()
    right.set_xlabel("step")
    right.set_ylabel("mean reward of the step")
    right.legend()
    figure.tight_layout()
    figure.savefig(os.path.join(out, "results.svg"))


if __name__ == "__main__":
    main()
