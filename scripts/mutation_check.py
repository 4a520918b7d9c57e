#!/usr/bin/env python3
"""Breaks the algorithms on purpose, one small change at a time, and shows that a test fails for each.

The changes are in tests/ppo/mutations.json: file, text (which occurs there exactly once), what it becomes, what that
would be. They are applied to a copy of the tracked files below build/mutation, never to the source tree. After each, the
test programs are rebuilt and run, the golden vectors first; what fails first has caught it. Exits with 1 when a mutation
survives, does not compile, or no longer applies.

  scripts/mutation_check.py                     all mutations; about a quarter of a minute each
  scripts/mutation_check.py --only dpo-sign,k3-reversed
  scripts/mutation_check.py --table             Markdown of the results so far (kept in build/mutation/results.json)
  scripts/mutation_check.py --dry-run           only checks that every mutation still applies (part of scripts/check.sh)
"""
import argparse
import json
import pathlib
import re
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
MUTATIONS = ROOT / "tests/ppo/mutations.json"
WORK = ROOT / "build/mutation"
SOURCE = WORK / "source"
BUILD = SOURCE / "build/base-only"
RESULTS = WORK / "results.json"
TEST_LIMIT_S = 600

# Test programs and their arguments, the quickest to catch something first. -a stops at the first failure.
GOLDEN = "every golden vector*"
STEPS = [
    ("ppo_vectors_test", [GOLDEN]),
    ("ppo_vectors_test", ["-a", "~" + GOLDEN]),
    ("reward_rules_test", ["-a"]),
    ("kl_optimum_test", ["-a"]),
    ("train_test", ["-a"]),
]


def load_mutations():
    """Returns the mutations and a list of what is wrong with them."""
    mutations = json.loads(MUTATIONS.read_text(encoding="utf-8"))
    problems, names = [], set()
    for mutation in mutations:
        name, path = mutation["name"], ROOT / mutation["file"]
        if name in names:
            problems.append(f"{name}: given twice")
        names.add(name)
        count = path.read_text(encoding="utf-8").count(mutation["from"]) if path.exists() else 0
        if count != 1:
            problems.append(f"{name}: its text occurs {count} times in {mutation['file']}, expected once")
        if mutation["from"] == mutation["to"]:
            problems.append(f"{name}: changes nothing")
    return mutations, problems


def copy_sources():
    """Brings build/mutation/source to the state of the tracked files; equal files keep their time stamps."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True,
                            capture_output=True).stdout.decode().split("\0")
    for name in filter(None, listed):
        source, target = ROOT / name, SOURCE / name
        if not source.is_file():
            target.unlink(missing_ok=True)
            continue
        if target.is_file() and target.read_bytes() == source.read_bytes():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


def run(command, limit_s=None):
    """Returns (exit code, output); code None when the limit was reached."""
    try:
        done = subprocess.run(command, cwd=SOURCE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              errors="replace", timeout=limit_s, check=False)
        return done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        return None, (error.stdout or b"").decode(errors="replace")


def configure():
    code, output = run(["cmake", "--preset", "base-only", "-Wno-dev"])
    if code != 0:
        sys.exit(f"{output}\nmutation_check: the copy in {SOURCE} cannot be configured")


def build(targets):
    return run(["cmake", "--build", str(BUILD), "--target", *targets])


def describe_failure(target, arguments, code, output):
    if code is None:
        return f"{target}: no end within {TEST_LIMIT_S} s"
    if GOLDEN in arguments:
        files = re.findall(r"^(\S+\.json): \d+ cases, [1-9]\d* failures", output, re.MULTILINE)
        if files:
            more = f" and {len(files) - 3} more" if len(files) > 3 else ""
            return "vectors: " + ", ".join(file.removesuffix(".json") for file in files[:3]) + more
    # The name of a failed test case stands between two dashed lines.
    names = re.findall(r"^-{20,}\n(.+(?:\n  .+)*)\n-{20,}$", output, re.MULTILINE)
    return f"{target}: {' '.join(names[0].split()) if names else f'exit code {code}'}"


def first_failure():
    """Builds and runs the tests in order. Returns what failed first, or None; raises when a build fails."""
    for target, arguments in STEPS:
        code, output = build([target])
        if code != 0:
            raise RuntimeError(output[-3000:])
        code, output = run([str(BUILD / "tests" / target), *arguments], TEST_LIMIT_S)
        if code != 0:
            return describe_failure(target, arguments, code, output)
    return None


def check_mutation(mutation):
    """Returns what caught the mutation; a text that starts with SURVIVED or INVALID when nothing did."""
    path = SOURCE / mutation["file"]
    original = path.read_text(encoding="utf-8")
    path.write_text(original.replace(mutation["from"], mutation["to"]), encoding="utf-8")
    try:
        return first_failure() or "SURVIVED"
    except RuntimeError as error:
        return f"INVALID, does not compile: {error}"
    finally:
        path.write_text(original, encoding="utf-8")


def print_table(mutations, results):
    print("| mutation | file | what it would be | caught by |\n|---|---|---|---|")
    for mutation in mutations:
        caught = results.get(mutation["name"], "not run").split("\n")[0].replace("|", "\\|")
        print(f"| `{mutation['name']}` | {pathlib.Path(mutation['file']).name} | {mutation['why']} | {caught} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names of mutations, comma separated")
    parser.add_argument("--no-baseline", action="store_true", help="do not first show that the tests pass unchanged")
    parser.add_argument("--dry-run", action="store_true", help="only check that the mutations apply")
    parser.add_argument("--table", action="store_true", help="print the results so far and stop")
    arguments = parser.parse_args()

    mutations, problems = load_mutations()
    if problems:
        sys.exit("\n".join(problems))
    if arguments.dry_run:
        print(f"{len(mutations)} mutations apply")
        return
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if arguments.table:
        print_table(mutations, results)
        return
    chosen = mutations
    if arguments.only:
        names = arguments.only.split(",")
        chosen = [m for m in mutations if m["name"] in names]
        if len(chosen) != len(names):
            sys.exit(f"no such mutation: {', '.join(set(names) - {m['name'] for m in chosen})}")

    SOURCE.mkdir(parents=True, exist_ok=True)
    copy_sources()
    configure()
    if not arguments.no_baseline:
        failed = first_failure()
        if failed:
            sys.exit(f"the tests fail without a mutation: {failed}")
    survivors = []
    for mutation in chosen:
        begin = time.monotonic()
        caught = check_mutation(mutation)
        results[mutation["name"]] = caught
        RESULTS.write_text(json.dumps(results, indent=1), encoding="utf-8")
        print(f"{time.monotonic() - begin:6.1f} s  {mutation['name']}: {caught}", flush=True)
        if caught.startswith(("SURVIVED", "INVALID")):
            survivors.append(mutation["name"])
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutations caught")
    if survivors:
        sys.exit("not caught: " + ", ".join(survivors))


if __name__ == "__main__":
    main()
