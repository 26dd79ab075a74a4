"""One page with all measurements of the processor, made by one command; asserts nothing.

    python tests/benchmarks/page.py --out FOLDER [--only recorded growth] [--threads 1]

The benchmarks run one after another on a machine that should do nothing else. The page
FOLDER/benchmarks.md has the date, the machine, the versions, what each of them printed, and its
pictures, which stand beside the page. One that fails is reported on the page with its error.
"""

import argparse
import importlib.metadata
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from timing import processor

HERE = Path(__file__).parent
LIBRARIES = ("torch", "pyro-ppl", "numpy", "numpyro", "jax", "scikit-learn")
PARTS = {
    "recorded": ("The first seconds of a fit", "recorded.py", ("--threads", "{threads}")),
    "ways": ("Fits of several lengths by each way", "ways.py", ("--threads", "{threads}")),
    "growth": ("How cost grows", "growth.py", ("--out", "{out}")),
    "steps": ("Training steps", "run.py", ("--threads", "{threads}", "--out", "{out}")),
    "ppca": ("PPCA", "ppca.py", ()),
}
"""The parts of the page: their title, program, and arguments."""
PICTURES = {"growth": "growth.png", "steps": "speed.png"}


def about():
    """The machine, and the versions of the libraries that are installed."""
    versions = [f"Python {sys.version.split()[0]}"]
    for name in LIBRARIES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} is not installed")
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{datetime.now(UTC):%Y-%m-%d}; {processor()}, {os.cpu_count()} processors, of which "
        f"other programs used {load} on average in the last 1, 5 and 15 minutes; "
        f"{', '.join(versions)}"
    )


def section(name, given):
    """Run one benchmark; returns its part of the page."""
    title, program, arguments = PARTS[name]
    filled = [text.format(threads=given.threads, out=given.out) for text in arguments]
    done = subprocess.run(
        [sys.executable, str(HERE / program), *filled], capture_output=True, text=True
    )
    output = done.stdout.strip()
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
        output += f"\nfailed: {lines[-1]}"
    command = " ".join(["python", f"tests/benchmarks/{program}", *filled])
    text = f"## {title}\n\n`{command}`\n\n```text\n{output}\n```\n"
    picture = PICTURES.get(name)
    if picture and (given.out / picture).is_file():
        text += f"\n![{title}]({picture})\n"
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    parts = [f"# Benchmarks\n\n{about()}.\n"]
    for name in given.only:
        parts.append(section(name, given))
        (given.out / "benchmarks.md").write_text("\n".join(parts))
        print(f"{name} is done", flush=True)


if __name__ == "__main__":
    main()
