"""A process that ends or fails ends the others, and a fit goes on from its last checkpoint."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import svi_cases as cases
import torch
from tables import table
from workers import SECONDS, Workers


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("kind", ["EM", "Bayesian", "SVI", "SVI by shared memory"])
def test_deaths_at_random_moments(kind, size, tmp_path):
    """The others end with an error that names the rank, and no checkpoint is lost."""
    moments, file = random.Random(f"{kind} {size}"), tmp_path / "fit.ckpt"
    for _ in range(4):
        rank, seconds = moments.randrange(size), moments.uniform(0.0, 2.5)
        workers = Workers(size)
        workers.start()
        try:
            for pipe in workers.pipes:
                pipe.send((cases.endless, (kind, table(40, missing=0.1), str(file))))
            time.sleep(seconds)
            written = file.exists() and steps_of(file)
            pid = workers.processes[rank].pid
            os.kill(pid, signal.SIGKILL)
            start = time.monotonic()
            for other in set(range(size)) - {rank}:
                returned, text = workers.receive(other)
                assert not returned
                # One that ends because of another is itself missing for a third one.
                assert f"rank {rank} (process {pid}) has ended" in text, text
            assert time.monotonic() - start < SECONDS
            if file.exists():
                assert steps_of(file) >= written
        finally:
            workers.close()
        print(f"{kind}, {size} processes, rank {rank} after {seconds:.2f} s: {text[:90]}")


def steps_of(file):
    content = io.BytesIO(file.read_bytes()[32:])  # after the checksum
    return len(torch.load(content, weights_only=True)["values"])


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


def workers_of(pid):
    """The processes that torchrun launched."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=True)
    return [int(line) for line in found.stdout.split()]
