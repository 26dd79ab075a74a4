"""A Bernoulli VAE on fixed binarized MNIST: its log p by three methods, in bounded memory."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from ppl_vae import VAE, Bernoulli, cross_check, fit_svi, save
from ppl_vae.data import image_set
from ppl_vae.evaluation import Annealing

NUM_GIVEN = 100
"""Images that all three methods are evaluated on."""
SCORE = """
import json, resource, sys
import numpy as np, torch
from ppl_vae import load, log_likelihood

torch.set_num_threads(1)
vae = load(sys.argv[1])
x = torch.from_numpy(np.load(sys.argv[2]))
estimate = log_likelihood(vae.model, vae.guide, x, 5000, seed=0)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(estimate, estimate.execution, sep="\\n", file=sys.stderr)
print(json.dumps({"value": estimate.mean, "error": estimate.mean_error, "peak": peak}))
"""


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif("PPL_VAE_DATA" not in os.environ, reason="no data sets")
def test_log_p_by_three_methods_in_two_gigabytes(tmp_path):
    """5,000 draws on 1,000 images in under 2 GB; then three methods in one table."""
    vae = VAE.mlp(784, 20, hidden=(200,), likelihood=Bernoulli(), activation="tanh", seed=0)
    x = image_set("BinarizedMNIST").x
    print(fit_svi(vae.model, vae.guide, x, epochs=40, batch_size=100, lr=1e-3, seed=0))
    save(vae, tmp_path / "vae")
    test = image_set("BinarizedMNIST", "test").shuffled(seed=0).x[:1000]
    np.save(tmp_path / "test.npy", test.numpy())
    command = [sys.executable, "-c", SCORE, str(tmp_path / "vae"), str(tmp_path / "test.npy")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    print(done.stderr, found)
    assert found["peak"] < 2.0
    # Networks of this size reach about 90 nats after training of this length, and never 80.
    assert 80 < -found["value"] < 100
    comparison = cross_check(
        vae.model,
        vae.guide,
        test[:NUM_GIVEN],
        5000,
        annealing=Annealing(500, leapfrog=8),
        seed=0,
    )
    print(comparison, comparison.to_frame(), sep="\n")
    refined, annealed = comparison.estimates["refined"], comparison.estimates["annealed"]
    less, error = comparison.difference("annealed", "refined")
    assert less > -3 * error
    both = refined.reliable & annealed.reliable
    errors = refined.standard_error.hypot(annealed.standard_error)
    assert both.sum() > 20
    assert ((annealed.value - refined.value) / errors)[both].abs().max() < 5
    assert comparison.difference("refined", "importance")[0] > 0
