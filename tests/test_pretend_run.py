"""``pytest --pretend-gpu``: what it moves, what it leaves out, and where it cannot run."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import pretend_device
from ppl_vae import PPCA, VAE, fit_em
from pretend_exceptions import EXCEPTIONS
from pretend_run import counted_report, on_pretended_device

ROOT = Path(__file__).parents[1]
MOST_EXCEPTIONS = 0.05
pretend_device.register()
needs_device = pytest.mark.skipif(
    bool(pretend_device.STATE.unsupported), reason=pretend_device.STATE.unsupported
)


@needs_device
def test_what_a_test_makes_is_on_the_device():
    with on_pretended_device():
        made = [
            torch.zeros(2),
            torch.from_numpy(np.ones(2)),
            torch.randn(2, generator=torch.Generator().manual_seed(0)),
            nn.Linear(2, 2).weight,
            VAE.mlp(3, 2, seed=0).state_dict().popitem()[1],
        ]
    assert {tensor.device for tensor in made} == {pretend_device.DEVICE}


@needs_device
def test_arrays_are_fitted_on_the_device():
    x = np.random.default_rng(0).normal(size=(30, 4))
    found = []
    for moved in (False, True):
        if moved:
            with on_pretended_device():
                ppca = PPCA.like(x, 2, seed=0)
                fit_em(ppca, x, max_iterations=3)
                assert ppca.loadings.device == pretend_device.DEVICE
                found.append(ppca.loadings.detach().numpy(force=True))
        else:
            ppca = PPCA.like(x, 2, seed=0)
            fit_em(ppca, x, max_iterations=3)
            found.append(ppca.loadings.detach().numpy())
    np.testing.assert_allclose(found[0], found[1], rtol=1e-12, atol=1e-12)


def test_exceptions_exist_and_are_few():
    sources = {path: path.read_text() for path in ROOT.glob("tests/**/test_*.py")}
    for name in EXCEPTIONS:
        file, test = name.split("::")
        assert f"def {test}(" in sources[ROOT / file], name
    number = sum(len(re.findall(r"^def test_", text, re.MULTILINE)) for text in sources.values())
    assert len(EXCEPTIONS) < MOST_EXCEPTIONS * number
    assert all(EXCEPTIONS.values())


def test_a_torch_without_the_backend_is_named(monkeypatch):
    monkeypatch.setattr(pretend_device, "STATE", pretend_device.PretendedDevice())
    name = "_setup_privateuseone_for_python_backend"
    monkeypatch.delattr(f"torch.utils.backend_registration.{name}", raising=False)
    pretend_device.register()
    assert re.search("torch .* has no Python backend", pretend_device.STATE.unsupported)


@needs_device
def test_the_report_names_reads_by_line():
    with on_pretended_device(), pretend_device.count_waits() as waits:
        ppca = PPCA.like(np.random.default_rng(0).normal(size=(20, 3)), 1, seed=0)
        fit_em(ppca, torch.randn(20, 3).double(), max_iterations=2)
    report = "\n".join(counted_report(waits))
    assert re.search(r"\n +\d+ read .*ppl_vae/inference/em/state.py:\d+", report)
