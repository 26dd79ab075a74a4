"""Run the tests on a CPU and on the pretended accelerator, and compare all that they return.

    python tests/benchmarks/pretended.py [--keep DIR] [FOLDER_OR_FILE ...]

prints one table by folder. A test *computes* if the package returned at least one array of
floating point numbers to it. Of those tests it counts which ran with tensors on the pretended
accelerator, passed there, and were returned numbers whose bits are all those of the CPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RUNS = {"cpu": [], "device": ["--pretend-gpu"]}
GOAL = 0.95
COLUMNS = (
    ("tests", "tests"),
    ("compute", "compute"),
    ("bits", "on the device, the CPU's bits"),
    ("other bits", "on the device, other bits"),
    ("host", "on the CPU only"),
    ("excepted", "excepted"),
    ("failed", "failed"),
)

Line = dict[str, Any]


def run_tests(path: str, folder: Path) -> dict[str, dict[str, Line]]:
    """The lines of both runs of the tests of a path, by test; kept files are not made again."""
    found = {}
    for run, options in RUNS.items():
        file = folder / f"{path.replace('/', '.')}.{run}.jsonl"
        if not file.exists():
            part = file.with_suffix(".part")
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-n0",
                "--tb=short",
                "-p",
                "no:cacheprovider",
            ]
            output = subprocess.run(
                [*command, *options, "--digests", str(part), path],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
                check=False,
            )
            file.with_suffix(".log").write_text(output.stdout + output.stderr)
            if output.returncode not in (0, 1):
                raise RuntimeError(f"pytest ended with {output.returncode}; see the log of {file}")
            part.rename(file)
        found[run] = {line["test"]: line for line in map(json.loads, file.open())}
    return found


def kind_of(cpu: Line, device: Line) -> str:
    """The column in which a test that computes is counted."""
    if device["outcome"] == "passed" and cpu["outcome"] == "passed":
        if not device["operations"]:
            return "host"
        return "bits" if device["results"] == cpu["results"] else "other bits"
    return "excepted" if "skipped" in device["outcome"] else "failed"


def counts(runs: dict[str, dict[str, Line]]) -> tuple[Counter[str], dict[str, list[str]]]:
    """The number of tests of each column, and the tests that are not in the column ``"bits"``."""
    number: Counter[str] = Counter()
    named: dict[str, list[str]] = {}
    for test, cpu in runs["cpu"].items():
        if cpu["outcome"].startswith("skipped"):
            continue  # it needs data or software that is not there
        device = runs["device"].get(test, cpu | {"outcome": "failed: it did not run"})
        number["tests"] += 1
        if not cpu["arrays"]:
            number["failed"] += device["outcome"].startswith("failed")
            continue
        kind = kind_of(cpu, device)
        number.update(["compute", kind])
        if kind != "bits":
            named.setdefault(kind, []).append(f"{test}{difference(kind, cpu, device)}")
    return number, named


def difference(kind: str, cpu: Line, device: Line) -> str:
    """The first function with other results, or why a test did not run."""
    if kind == "other bits":
        pairs = zip(cpu["results"], device["results"], strict=False)
        first = next((one[0] for one, other in pairs if one != other), "the number of calls")
        return f": {first}"
    return f": {device['reason'].splitlines()[-1]}" if device["reason"] else ""


def main() -> None:
    """Print the table, and the tests that are not equal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="*", help="folders or files of tests; all by default")
    parser.add_argument("--keep", type=Path, help="folder that keeps what both runs wrote")
    options = parser.parse_args()
    folders = [p for p in (ROOT / "tests").glob("*") if list(p.glob("**/test_*.py"))]
    files = (ROOT / "tests").glob("test_*.py")
    paths = options.paths or sorted(str(p.relative_to(ROOT)) for p in (*folders, *files))
    keep = options.keep or Path(tempfile.mkdtemp())
    keep.mkdir(parents=True, exist_ok=True)
    total: Counter[str] = Counter()
    notes: list[str] = []
    print("| tests of | " + " | ".join(title for _, title in COLUMNS) + " |")
    print("|---" + "|--:" * len(COLUMNS) + "|")
    for path in paths:
        number, named = counts(run_tests(path, keep))
        total += number
        notes += [f"{kind}: {test}" for kind, tests in named.items() for test in tests]
        print(f"| {path} | " + " | ".join(str(number[name]) for name, _ in COLUMNS) + " |")
    print("| all | " + " | ".join(str(total[name]) for name, _ in COLUMNS) + " |")
    print("\n".join(["", *sorted(notes)]))
    share = total["bits"] / max(total["compute"], 1)
    print(
        f"\n{total['bits']} of {total['compute']} tests that compute ({share:.1%}) have the CPU's "
        f"bits on the pretended accelerator; the goal is {GOAL:.0%}"
    )


if __name__ == "__main__":
    main()
