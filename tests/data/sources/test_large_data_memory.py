"""Peak memory of fits to tables on the disk, which does not grow with the number of rows."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc"),
]

SCRIPT = """
import sys
import numpy as np
import pyarrow.parquet
import torch
from ppl_vae import PPCA, AmortizedGuide, fit_closed_form, fit_em, fit_svi
kind, path, rows, width = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

def peak():
    text = open("/proc/self/status").read()
    return int(text.split("VmHWM:")[1].split()[0]) / 1024

few = torch.randn(2000, width, generator=torch.Generator().manual_seed(0))

def fit(x):
    ppca = PPCA.like(few, 3, seed=0)
    if kind == "svi":
        guide = AmortizedGuide(torch.nn.Linear(width, 6), 3)
        fit_svi(
            ppca.model, guide, x, steps=40, batch_size=1000, lr=0.01, seed=0, capture=False,
            checkpoint=path + ".ckpt" if isinstance(x, str) else None,
        )
    else:
        (fit_em if kind == "em" else fit_closed_form)(ppca, x)

fit(few)
before = peak()
x = path if path.endswith(".parquet") else np.memmap(
    path, dtype=np.float32, mode="r", shape=(rows, width)
)
fit(x)
print(before, peak())
"""


def write_table(path, rows, width, group):
    """Write a table by parts; returns its size in float32 in MiB."""
    loadings = np.random.default_rng(0).normal(size=(3, width)).astype(np.float32)
    schema = pa.schema([(f"column {k}", pa.float32()) for k in range(width)])

    def parts():
        for low in range(0, rows, group):
            rng, size = np.random.default_rng(low), min(group, rows - low)
            x = rng.standard_normal((size, 3), np.float32) @ loadings
            yield x + rng.standard_normal(x.shape, np.float32)

    if path.suffix == ".parquet":
        with pa.parquet.ParquetWriter(path, schema) as writer:
            for x in parts():
                writer.write_table(pa.table(list(x.T), schema=schema), row_group_size=group)
    else:
        with path.open("wb") as file:
            for x in parts():
                x.tofile(file)
    return rows * width * 4 / 2**20


def measured(kind, path, rows, width):
    """Peak memory in MiB of a process before and after a fit."""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, kind, str(path), str(rows), str(width)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    before, after = map(float, run.stdout.split())
    return before, after


@pytest.mark.parametrize("name", ["x.dat", "x.parquet"])
def test_memory_of_svi(name, tmp_path):
    rows, width = 2_000_000, 50
    path = tmp_path / name
    size = write_table(path, rows, width, 200_000)
    before, after = measured("svi", path, rows, width)
    print(f"{name}: table {size:.0f} MiB, peak {after:.0f} MiB, {after - before:.0f} MiB more")
    # Three groups of 2^23 numbers in float32; of each column of a Parquet file a page and a
    # dictionary, at most 1 MiB each; and what a process needs to read, a few pieces of 1 MiB.
    groups, pages, pieces = 3 * 32, 2 * width * (path.suffix == ".parquet"), 24
    assert after - before < groups + pages + pieces


@pytest.mark.parametrize("kind", ["closed form", "em"])
def test_memory_of_exact_fits_to_parquet(kind, tmp_path):
    rows, width = 5_000_000, 100
    size = write_table(tmp_path / "x.parquet", rows, width, 500_000)
    before, after = measured(kind, tmp_path / "x.parquet", rows, width)
    print(f"{kind}: table {size:.0f} MiB, peak {after:.0f} MiB, {after - before:.0f} MiB more")
    assert after < 1200
