#!/usr/bin/env python3
"""The throughput ladder: what each part of the program is worth on one piece of work.

  benchmarks/ladder.py PROGRAM --work FOLDER --response-tokens N [--runs R] [further options of `rlhf bench pipeline`]

Runs the rungs B0 to B4 in turn, R times, and prints a Markdown table of medians. All rungs train the same weights on
the same samples; the script fails where what they learned differs.
"""

import argparse
import json
import statistics
import subprocess
import sys

RUNGS = {
    "B0": "no K/V cache, padded generation and passes, separate models",
    "B1": "+ K/V cache",
    "B2": "+ continuous batching, shared prompts",
    "B3": "+ shared weights and heads, ragged passes",
    "B4": "+ overlap (streamed)",
}


def run(program: str, rung: str, options: list[str]) -> dict:
    command = [program, "bench", "pipeline", "--rung", rung, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def check_learned(results: dict[str, list[dict]]) -> float:
    """Largest relative difference of what two rungs learned; B4 is the measure."""
    top = results["B4"][0]["learned"]
    scale = max(abs(x) for x in top)
    worst = max(abs(a - b) / scale for runs in results.values() for r in runs for a, b in zip(r["learned"], top))
    if not scale > 0 or worst > 1e-3:
        sys.exit(f"the rungs did not learn the same: projections differ by {worst:g}")
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("--runs", type=int, default=3)
    arguments, options = parser.parse_known_args()
    results: dict[str, list[dict]] = {rung: [] for rung in RUNGS}
    for _ in range(arguments.runs):
        for rung in RUNGS:
            results[rung].append(run(arguments.program, rung, options))
    worst = check_learned(results)
    medians = {
        rung: {key: statistics.median(r[key] for r in runs)
               for key in ("samples_per_s", "generate_s", "score_s", "train_s", "peak_rss_mb")}
        for rung, runs in results.items()
    }
    base = medians["B0"]["samples_per_s"]
    print("| rung | | samples/s | of B0 | generate s | score s | train s | peak MB |")
    print("|---|---|---|---|---|---|---|---|")
    for rung, text in RUNGS.items():
        m = medians[rung]
        print(f"| {rung} | {text} | {m['samples_per_s']:.2f} | {m['samples_per_s'] / base:.2f} | {m['generate_s']:.2f} "
              f"| {m['score_s']:.2f} | {m['train_s']:.2f} | {m['peak_rss_mb']:.0f} |")
    print(f"\nMedians of {arguments.runs} interleaved runs; what was learned differs by {worst:.1e}.")


if __name__ == "__main__":
    main()
