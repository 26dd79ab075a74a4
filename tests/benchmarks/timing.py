"""What the benchmarks share: repetitions that take turns, tables, the machine's name."""

import platform
import statistics
import time
from pathlib import Path


def rounds(runs, repeats):
    """Seconds of each run, the runs taking turns."""
    times = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(found) for name, found in times.items()}


def show(title, table):
    """Print a table of contenders."""
    columns = list(next(iter(table.values())))
    print(f"\n{title}\n{'':48s}" + "".join(f"{column:>24s}" for column in columns))
    for name, row in table.items():
        cells = (
            "-" if v is None else f"{v:.3f}" if abs(v) < 100 else f"{v:.0f}" for v in row.values()
        )
        print(f"{name:48s}" + "".join(f"{cell:>24s}" for cell in cells), flush=True)


def processor():
    """The processor's name, where Linux states it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    named = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())
