"""A Bernoulli VAE on fixed binarized MNIST: its log p by three methods, in bounded memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ppl_vae import VAE, Annealing, Bernoulli, fit_svi, opinions, save

NUM_TOLD = 100
"""Images that all three methods look at."""
SCORE = """
import json, resource, sys
import numpy as np, torch
from ppl_vae import load, log_likelihood

torch.set_num_threads(1)
vae = load(sys.argv[1])
x = torch.from_numpy(np.load(sys.argv[2]).astype("float32"))
estimate = log_likelihood(vae.model, vae.guide, x, 5000, seed=0)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(estimate, estimate.path, sep="\\n", file=sys.stderr)
print(json.dumps({"value": estimate.mean, "error": estimate.mean_error, "peak": peak}))
"""


def images(part):
    archive = np.load(Path(os.environ["PPL_VAE_DATA"]) / "BinarizedMNIST" / "binarized_mnist.npz")
    return np.unpackbits(archive[part], axis=1)


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif("PPL_VAE_DATA" not in os.environ, reason="no data sets")
def test_log_p_by_three_methods_in_two_gigabytes(tmp_path):
    """5,000 draws on 1,000 images in under 2 GB; then three methods in one table."""
    vae = VAE.mlp(784, 20, hidden=(200,), likelihood=Bernoulli(), activation="tanh", seed=0)
    x = torch.from_numpy(images("train").astype("float32"))
    print(fit_svi(vae.model, vae.guide, x, epochs=40, batch_size=100, lr=1e-3, seed=0))
    save(vae, tmp_path / "vae")
    # The test set is sorted by class: its first rows are no sample of it.
    rows = np.random.default_rng(0).permutation(10_000)[:1000]
    test = images("test")[rows]
    np.save(tmp_path / "test.npy", test)
    command = [sys.executable, "-c", SCORE, str(tmp_path / "vae"), str(tmp_path / "test.npy")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    print(done.stderr, found)
    assert found["peak"] < 2.0
    # Networks of this size are near 90 nats after training of this length, and never near 80.
    assert 80 < -found["value"] < 100
    told = opinions(
        vae.model,
        vae.guide,
        torch.from_numpy(test[:NUM_TOLD].astype("float32")),
        5000,
        annealing=Annealing(500, leapfrog=8),
        seed=0,
    )
    print(told, told.to_frame(), sep="\n")
    refined, annealed = told.estimates["refined"], told.estimates["annealed"]
    less, error = told.difference("annealed", "refined")
    assert less > -3 * error
    both = refined.reliable & annealed.reliable
    errors = refined.standard_error.hypot(annealed.standard_error)
    assert both.sum() > 20
    assert ((annealed.value - refined.value) / errors)[both].abs().max() < 5
    assert told.difference("refined", "importance")[0] > 0
