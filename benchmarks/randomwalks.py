#!/usr/bin/env python3
"""Trains on the random walks with every algorithm, or in every schedule mode, and prints a table of what was reached.

Each case is configs/runs/randomwalks.yaml with a few --set options (CASES below; --print shows the commands). Runs lie
in build/randomwalks/CASE-SEED; finished ones are not repeated. The thresholds of the task: greedy score at least 0.99,
sampled score (50 draws per start) at least 0.96 at iteration 40.

  benchmarks/randomwalks.py [--only ppo,grpo] [--seeds 1,2,3] [--program build/release/rlhf] [--print | --table]
"""
import argparse
import json
import pathlib
import shlex
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
RUN_FILE = "configs/runs/randomwalks.yaml"
RUNS = ROOT / "build/randomwalks"

# What all algorithms have in common with PPO's run: its batch and its optimizer. A preset's own are those of large models.
SIZE = "prompts_per_step: 20, samples_per_prompt: 7"
STEPS = "epochs: 2, mini_batches: 1"
OPTIMIZER = "optimizer: {learning_rate: 3.0e-4, beta2: 0.95, weight_decay: 0, schedule: {shape: constant, warmup_steps: 0}}"


def algorithm(preset, *more, steps=STEPS):
    """The whole group ppo.algorithm in place of the run file's: a preset and what is changed of it."""
    return ["ppo.algorithm={" + ", ".join([f"preset: {preset}", SIZE, steps, OPTIMIZER, *more]) + "}"]


NO_KL = "policy: {kl: {coefficient: 0}}"


def grouped(baseline, scale="none", policy=NO_KL):
    """GRPO with another baseline and scale of the group."""
    return algorithm("verl-grpo", policy, f"advantage: {{group: {{baseline: {baseline}, scale: {scale}}}}}")


ALGORITHMS = {
    "ppo": [],
    "grpo": algorithm("trl-grpo"),
    "rloo": algorithm("trl-rloo", "kl: {placement: none}"),
    "reinforce++": algorithm("openrlhf-reinforce++", "kl: {placement: none}"),
    "dapo": algorithm("dapo"),
    "gspo": algorithm("gspo"),
    "cispo": algorithm("cispo"),
    "dr-grpo": algorithm("dr-grpo"),
    "maxrl": algorithm("maxrl"),
    "remax": algorithm("verl-grpo", "policy: {kl: {coefficient: 0}}",
                       "advantage: {form: reward_to_go, greedy_baseline: true, group: {baseline: none, scale: none}}"),
    "rloo-token": algorithm("trl-rloo", "kl: {placement: none}", "policy: {ratio_level: token}"),
    "reinforce++-baseline": algorithm("openrlhf-reinforce++", "kl: {placement: none}", "advantage: {group: {baseline: mean}}"),
    "opo": grouped("length_weighted"),
    "gpg": grouped("mean", "non_zero_share", "policy: {objective: reinforce, kl: {coefficient: 0}}"),
    "pass@k": grouped("best_of_group"),
    "token-baseline": algorithm("verl-grpo", NO_KL, "advantage: {form: token_baseline, group: {baseline: none, scale: none}}"),
    "sapo": algorithm("trl-grpo", "policy: {objective: sapo}"),
    "gmpo": algorithm("trl-grpo", "policy: {objective: geometric_mean, clip_low: 0.4, clip_high: 0.4}"),
    "clip-cov": algorithm("trl-grpo", "policy: {objective: clip_cov}"),
    "kl-cov": algorithm("trl-grpo", "policy: {objective: kl_cov}"),
    "online-dpo": [
        "stages=[sft, online_preference, eval]",
        "online_preference={iterations: 40, prompts_per_step: 20, samples_per_prompt: 7, loss: {beta: 0.1}, "
        "optimizer: {learning_rate: 1.0e-3, beta2: 0.95, schedule: {shape: constant}}}",
    ],
}
MODES = {
    "serial": ["schedule.mode=serial"],
    "streamed": ["schedule.mode=streamed"],
    "one_step_off": ["schedule.mode=one_step_off"],
    "one_step_off-decoupled": ["schedule.mode=one_step_off", "ppo.algorithm.correction={level: token}"],
    "async-2": ["schedule.mode=async", "schedule.max_staleness=2"],
    "async-2-decoupled": ["schedule.mode=async", "schedule.max_staleness=2", "ppo.algorithm.correction={level: token}"],
}
CASES = ALGORITHMS | MODES


def command(program, case, seed):
    settings = [f"run.name={case}-{seed}", f"run.dir={(RUNS / f'{case}-{seed}').relative_to(ROOT)}", f"run.seed={seed}"]
    words = [program, "train", RUN_FILE, "--overwrite"]
    for setting in settings + CASES[case]:
        words += ["--set", setting]
    return words


def result_of(case, seed):
    """What a finished run has reached, or None."""
    folder = RUNS / f"{case}-{seed}"
    if not (folder / "wall_s").exists():
        return None
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [step for step in steps if step["stage"] in ("ppo", "online_preference")][-1]
    (task,) = summary["tasks"].values()
    final = task["stages"][next(name for name in ("ppo", "online_preference") if name in task["stages"])]
    return {
        "greedy": summary["metrics"]["greedy"],
        "sampled": summary["metrics"]["sampled"],
        "kl": final.get("kl"),
        "length": last["rollout/mean_length"],
        "eos": last["rollout/eos_rate"],
        "wall_s": float((folder / "wall_s").read_text(encoding="utf-8")),
    }


def mean_and_spread(values, digits):
    if any(value is None for value in values):
        return "-"
    spread = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def print_table(cases, seeds):
    print("| case | seeds | greedy, each seed | sampled | KL | mean length | EOS rate | wall, s |\n|---|---|---|---|---|---|---|---|")
    for case in cases:
        runs = [run for run in (result_of(case, seed) for seed in seeds) if run]
        if not runs:
            continue
        column = lambda key, digits: mean_and_spread([run[key] for run in runs], digits)
        greedy = ", ".join(f"{run['greedy']:.3f}" for run in runs)
        print(f"| {case} | {len(runs)} | {greedy} | {column('sampled', 3)} | {column('kl', 2)} | {column('length', 2)} | "
              f"{column('eos', 3)} | {column('wall_s', 1)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CASES), help="cases, comma separated")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--program", default="build/release/rlhf")
    parser.add_argument("--print", action="store_true", help="print the commands and stop")
    parser.add_argument("--table", action="store_true", help="print the table of finished runs and stop")
    arguments = parser.parse_args()
    cases, seeds = arguments.only.split(","), [int(seed) for seed in arguments.seeds.split(",")]
    unknown = [case for case in cases if case not in CASES]
    if unknown:
        sys.exit(f"no such case: {', '.join(unknown)}; there are {', '.join(CASES)}")
    for case in cases:
        for seed in seeds:
            words = command(arguments.program, case, seed)
            if arguments.print:
                print(shlex.join(words))
            elif not arguments.table and not result_of(case, seed):
                begin = time.monotonic()
                done = subprocess.run(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
                if done.returncode != 0:
                    sys.exit(f"{shlex.join(words)}\n{done.stderr[-2000:]}")
                (RUNS / f"{case}-{seed}" / "wall_s").write_text(f"{time.monotonic() - begin:.2f}", encoding="utf-8")
    if not arguments.print:
        print_table(cases, seeds)


if __name__ == "__main__":
    main()
