#!/usr/bin/env python3
"""Reinforcement learning against supervised fine-tuning, by the number of trained numbers: the paper's figure (arXiv 2602.04118) at our scale.

    cargo build --release
    python3 bench/figure.py --mote target/release/mote --out bench/results/figure
    python3 bench/figure.py --mote target/release/mote --out bench/results/questions --questions DATA --model qwen2.5-coder-0.5b.gguf

Every run is `mote train` on generated tasks (`mote task`), or on the questions of SVAMP and GSM8K (`DATA/svamp/SVAMP.json`, `DATA/gsm8k/train.jsonl` and `test.jsonl`): the
same items, prompt and token limit for every arm of a task, an adapter's numbers all that differs. Learning rates are
chosen by a sweep on items that nothing else uses, at seeds that nothing else uses. A run that has been made is not made again: stop it and start it as you like.
What a run finds does not depend on its threads or on what else the machine does, so several runs of one thread share it (`--parallel`); their cost is told in processor time.
`--plan` prints what is left. The last step writes `results.json`, `results.md` and, if matplotlib is there, `results.svg`.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time


def groups(count):
    """One number for each of so many groups of sites; 13 of them are the default scheme. The model has 210 sites."""
    return {"convention": "peft", "rank": 2, "u": 1, "ties": {"kind": "groups", "count": count}}


@dataclasses.dataclass
class Size:
    """Of a run: steps, prompts a step, completions a prompt, the most tokens of each, and items."""

    steps: int = 30
    prompts: int = 6
    samples: int = 6
    tokens: int = 24
    train: int = 400
    held_out: int = 200  # so many to choose rates by, so many to report
    prompt: list[dict] | None = None  # messages, the last of which has the question's template


def answered(*turns):
    """A conversation that alternates, beginning with the user."""
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(turns)]


# Two answered questions, made up: without them the model writes programs until it is cut off, and asked for a short line it answers wrongly.
SVAMP = answered(
    "A shelf has 14 jars of honey and 9 jars of jam. Ana sells 6 jars of honey. How many jars of honey are left?",
    "14 - 6 = 8\n#### 8",
    "Each box holds 12 pencils. Tom has 5 boxes and 3 loose pencils. How many pencils does he have?",
    "5 * 12 = 60\n60 + 3 = 63\n#### 63",
    "{{item.Body}}. {{item.Question}}",
)
GSM8K = answered(
    "Mia buys 3 notebooks at $4 each and a pen for $2. She pays with a $20 bill. How much change does she get?",
    "3 * 4 = 12 dollars for the notebooks.\n12 + 2 = 14 dollars in all.\n20 - 14 = 6 dollars of change.\n#### 6",
    "A farm has 24 hens. Half of them lay 1 egg a day and the others lay 2. How many eggs does the farm get in a week?",
    "24 / 2 = 12 hens lay 12 * 1 = 12 eggs.\nThe other 12 lay 12 * 2 = 24 eggs.\n12 + 24 = 36 eggs a day.\n36 * 7 = 252 eggs a week.\n#### 252",
    "{{item.question}}",
)
SIZES = {
    "arithmetic": Size(),
    "only-number": Size(),
    "svamp": Size(steps=20, tokens=64, train=600, held_out=100, prompt=SVAMP),
    "gsm8k": Size(steps=12, prompts=4, tokens=160, train=2000, held_out=100, prompt=GSM8K),
}
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
# The questions: as many as two cores allow, at the rates that the sweep above found.
ARMS_OF_QUESTIONS = [
    ("svamp", "grpo", 13, 2, [0.01], ONE),
    ("gsm8k", "grpo", 13, 1, [0.01], ONE),
    ("svamp", "sft", 13, 1, [0.003], ONE),
]


def hyperparameters(size, method, rate):
    """What a run is told beside its data."""
    settings = {"steps": size.steps, "prompts_per_step": size.prompts, "max_completion_tokens": size.tokens, "learning_rate": rate}
    if method == "grpo":
        settings |= {"samples_per_prompt": size.samples}
    if method == "es":
        # What a step saves on the gradient it spends on candidates.
        settings |= {"samples_per_prompt": 1, "population": 32, "sigma": 0.1}
    return settings


class Runs:
    def __init__(self, args):
        self.args = args
        self.made = 0
        self.counted = {}
        os.makedirs(args.out, exist_ok=True)
        self.work = args.work or os.path.join(args.out, "runs")
        os.makedirs(self.work, exist_ok=True)

    def task(self, task):
        """The folder of a task's data: items to train on, to choose rates by, and to report."""
        folder, size = os.path.join(self.work, task), SIZES[task]
        if os.path.exists(os.path.join(folder, "test.jsonl")):
            return folder
        if task in ("svamp", "gsm8k"):
            os.makedirs(folder, exist_ok=True)
            parts = questions(self.args.questions, task, size)
        else:
            make = [self.args.mote, "task", task, "--out", folder, "--train", str(size.train), "--validation", str(2 * size.held_out)]
            subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
            with open(os.path.join(folder, "validation.jsonl")) as file:
                lines = file.read().splitlines()
            parts = {"dev": lines[: size.held_out], "test": lines[size.held_out :]}
        for name, lines in parts.items():
            with open(os.path.join(folder, name + ".jsonl"), "w") as file:
                file.writelines(line + "\n" for line in lines)
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
            command += ["--seed", str(seed), "--out", out]
            if os.path.exists(os.path.join(folder, "grader.json")):
                command += ["--grader", "@" + os.path.join(folder, "grader.json")]
            if SIZES[task].prompt:
                command += ["--prompt", json.dumps(SIZES[task].prompt)]
            command += ["--scheme", json.dumps(groups(numbers))]
            command += ["--samples", "4" if held_out == "test" and not self.args.questions else "1", "--log", "warn"]
            for key, value in hyperparameters(SIZES[task], method, rate).items():
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
            spent = json.load(file)
        self.counted[name] = spent["cpu_seconds"]
        return found | spent

    @property
    def spent(self):
        """Seconds of a core that the runs took which were asked for."""
        return sum(self.counted.values())


def questions(data, task, size):
    """Lines of a dataset as published, cut into what is trained on, what chooses and what is reported."""
    if task == "svamp":
        with open(os.path.join(data, "svamp", "SVAMP.json")) as file:
            items = json.load(file)
        random.Random(0).shuffle(items)
        test, items = items[: size.held_out], items[size.held_out :]
    else:
        test, items = [], []
        for name, into in [("test", test), ("train", items)]:
            with open(os.path.join(data, "gsm8k", name + ".jsonl")) as file:
                into += [json.loads(line) for line in file]
        test = test[: size.held_out]
    dev, train = items[: size.held_out], items[size.held_out :][: size.train]
    return {name: [json.dumps(item) for item in part] for name, part in [("test", test), ("dev", dev), ("train", train)]}


def chosen_rate(runs, task, method, numbers, rates, seeds):
    """The rate with the best reward on the dev items, over the seeds and both ways of sampling; the table of all. One rate alone is taken as it is."""
    if len(rates) == 1:
        return rates[0], {}
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
    parser.add_argument("--questions", metavar="DATA", help="train on SVAMP and GSM8K, which lie in this folder")
    parser.add_argument("--out", default="bench/results/figure", help="folder of the results")
    parser.add_argument("--work", help="folder of single runs [default: runs in --out]")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no run after so many minutes")
    parser.add_argument("--parallel", type=int, default=os.cpu_count(), help="runs at a time, each of one thread; 1: one with all threads")
    parser.add_argument("--plan", action="store_true", help="say what is left, and do nothing")
    args = parser.parse_args()
    args.until = time.monotonic() + 60 * args.minutes
    runs = Runs(args)
    chosen = ARMS_OF_QUESTIONS if args.questions else ARMS
    if not args.plan:
        make(runs, chosen, args.parallel)
    arms = []
    for task, method, numbers, seeds, rates, sweep_seeds in chosen:
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
    shown = ["--questions DATA", f"--model {os.path.basename(args.model)}"] if args.questions else []
    write(args.out, arms, runs.spent, shown)


def make(runs, arms, parallel):
    """Makes what is missing, several runs at a time: an arm's sweep, then its seeds."""
    for task in {arm[0] for arm in arms}:
        runs.task(task)
    with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
        for task, method, numbers, seeds, rates, sweep_seeds in arms:
            sweep = [(rate, seed) for rate in rates for seed in sweep_seeds if len(rates) > 1]
            list(pool.map(lambda each: runs.run(task, method, numbers, *each, "dev"), sweep))
            rate, _ = chosen_rate(runs, task, method, numbers, rates, sweep_seeds)
            if rate is not None:
                list(pool.map(lambda seed: runs.run(task, method, numbers, rate, seed, "test"), range(seeds)))


def write(out, arms, spent, shown):
    """`spent`: seconds of a core; `shown`: the arguments that matter, without folders."""
    sizes = {task: dataclasses.asdict(SIZES[task]) for task in {arm["task"] for arm in arms}}
    with open(os.path.join(out, "results.json"), "w") as file:
        json.dump({"sizes": sizes, "arms": arms}, file, indent=1, sort_keys=True)
        file.write("\n")
    lines = [
        f"`{' '.join(['python3 bench/figure.py', *shown])}`; {spent / 3600:.1f} hours of one core in all, the sweeps included.",
        "",
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
            low, high = (arm["base_greedy_interval"][end] for end in ("low", "high"))
            between = f" ({low:.3f} to {high:.3f})" if way == "greedy" else ""
            cells += [f"{base:.3f}{between}", f"{mean:.3f}" + (f" ± {half:.3f}" if half is not None else ""), f"{mean - base:+.3f}"]
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
    else:
        plot.close(figure)
        return
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
