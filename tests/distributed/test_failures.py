"""A process that ends or fails ends the others, and a fit goes on from its last checkpoint."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import svi_cases as cases
from test_linear_fits import table
from workers import Workers


@pytest.mark.slow
@pytest.mark.parametrize("function", [cases.killed_in_em, cases.killed_in_svi])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_death_of_a_process_is_named(function, rank):
    workers = Workers(2)
    workers.start()
    try:
        for pipe in workers.pipes:
            pipe.send((function, (table(40), rank)))
        start = time.monotonic()
        returned, text = workers.receive(1 - rank)
        assert not returned
        assert f"rank {rank} (process {workers.processes[rank].pid}) has ended" in text
        assert time.monotonic() - start < 30
    finally:
        workers.close()


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.mark.slow
def test_torchrun_goes_on_from_the_last_checkpoint(tmp_path):
    """A worker is killed while the fit runs; the fit of its successors is that of no kill."""
    np.savetxt(tmp_path / "t.csv", table(200).numpy(), delimiter=",", comments="", header=NAMES)
    fit = ("-m", "ppl_vae", "fit", str(tmp_path / "t.csv"), "--model", "vae")
    fit += ("--latent-dim", "2", "--epochs", "400", "--patience", "1000")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*TORCHRUN, *fit, "--out", whole], check=True, capture_output=True, timeout=300)
    process = subprocess.Popen(
        [*TORCHRUN, "--max-restarts=1", *fit, "--out", killed], stderr=subprocess.PIPE
    )
    wait_until((killed / "checkpoint.pt").exists)
    time.sleep(1.0)
    os.kill(workers_of(process.pid)[-1], signal.SIGKILL)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr.decode()[-2000:]
    notes = json.loads((killed / "fit.json").read_text())["history"]["notes"]
    assert any("resumed" in note for note in notes)
    assert (killed / "model.safetensors").read_bytes() == (
        whole / "model.safetensors"
    ).read_bytes()


NAMES = ",".join("abcdefg")


def wait_until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def workers_of(pid):
    """The processes that torchrun launched."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=True)
    return [int(line) for line in found.stdout.split()]
