#!/usr/bin/env python3
"""Checks the include lines of the library against the layers in docs/design/layers.md.

An include may only point down. Prints every line that does not, and exits with 1 when there is one.
"""
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent

# folder -> folders that its files may include; every folder may include its own files and rlhf/core.
ALLOWED = {
    "rlhf/core": [],
    "rlhf/config": [],
    "rlhf/memory": [],
    "rlhf/schedule": ["rlhf/config"],
    "rlhf/data": [],
    "rlhf/report": [],
    "rlhf/distributed": ["rlhf/tensor"],
    "rlhf/ppo": ["rlhf/config", "rlhf/data"],
    "rlhf/tensor": ["rlhf/memory"],
    "rlhf/kernels": ["rlhf/tensor"],
    "rlhf/model": ["rlhf/config", "rlhf/data", "rlhf/distributed", "rlhf/kernels", "rlhf/tensor"],
    "rollout/cache": ["rlhf/memory", "rlhf/tensor"],
    "rollout/sampling": ["rlhf/config", "rlhf/data", "rlhf/kernels"],
    "rollout/engine": [
        "rlhf/config", "rlhf/data", "rlhf/kernels", "rlhf/memory", "rlhf/model", "rlhf/tensor",
        "rollout/cache", "rollout/sampling",
    ],
    "rollout/environment": ["rlhf/config", "rlhf/data", "rollout/engine"],
    "reward/scoring": ["rlhf/config", "rlhf/data"],
    "reward/rules": ["rlhf/config", "rlhf/data", "reward/scoring"],
    "reward/remote": ["rlhf/config", "rlhf/data", "reward/scoring"],
    "reward/model": ["rlhf/config", "rlhf/data", "rlhf/kernels", "rlhf/model", "rlhf/tensor", "reward/scoring"],
}
# These see everything below them.
TOP = ["rlhf/verify", "rlhf/train", "rlhf/cli", "rlhf/rlhf.h"]

# Single headers that may be included from below their folder: plain declarations without includes of their layer.
FREE_HEADERS = {"rlhf/verify/report.h", "rlhf/train/lr_schedule.h"}

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')


def folder_of(path):
    return "/".join(path.split("/")[:2])


def problem_with(source, quote, target):
    """Returns what is wrong with one include, or None."""
    if "yaml-cpp/" in target and not (source.startswith("rlhf/config/") and source.endswith(".cpp")):
        return "yaml-cpp stays inside rlhf/config/*.cpp"
    if target == "torch/torch.h" and source.endswith(".h"):
        return "torch/torch.h takes 20 s to compile and is not for headers"
    if quote != '"':
        return None
    if target.split("/")[0] not in ("rlhf", "reward", "rollout"):
        return "expected a path from the repository root"
    if not (ROOT / target).exists():
        return "no such file"
    here, there = folder_of(source), folder_of(target)
    if here == there or there == "rlhf/core" or target in FREE_HEADERS:
        return None
    if here in TOP:
        return "rlhf/cli is the program" if there == "rlhf/cli" else None
    if here not in ALLOWED:
        return f"{here} is not listed in scripts/check_layers.py"
    if there not in ALLOWED[here]:
        return f"{here} may not include {there}"
    return None


def main():
    failures = 0
    files = [p for top in ("rlhf", "reward", "rollout") for p in sorted((ROOT / top).rglob("*"))]
    for path in files:
        if path.suffix not in (".h", ".cpp", ".cu", ".cuh"):
            continue
        source = path.relative_to(ROOT).as_posix()
        lines = path.read_text(encoding="utf-8").splitlines()
        if path.suffix == ".h" and "#pragma once" not in lines:
            print(f"{source}:1: no #pragma once")
            failures += 1
        for number, line in enumerate(lines, 1):
            match = INCLUDE.match(line)
            reason = problem_with(source, *match.groups()) if match else None
            if reason:
                print(f"{source}:{number}: {match[2]}: {reason}")
                failures += 1
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
