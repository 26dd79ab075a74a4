"""Objectives that are not finite, on an accelerator, where they are read after several steps."""

import pytest
import torch

import oracles
import pretend_device
from ppl_vae import PPCA, AmortizedGuide, ExactGuide, fit_svi, mlp
from pretend_device import pretended_device

pretend_device.register()
pytestmark = pytest.mark.skipif(
    bool(pretend_device.STATE.unsupported), reason=pretend_device.STATE.unsupported
)


@pytest.fixture
def x():
    with pretended_device() as device:
        yield torch.from_numpy(oracles.simulate_ppca((4, 2), 1, 40, 6, seed=0)).to(device)


def test_a_guide_that_refuses_later_parameters_does_not_hide_the_step(x):
    """The exact posterior at NaN loadings is an error of its own, at the step that follows."""
    ppca = PPCA.like(x, 2, seed=0)
    before = [p.detach().clone() for p in ppca.parameters()]
    with pytest.raises(FloatingPointError, match=r"not finite at step 2.*is restored"):
        fit_svi(ppca.model, ExactGuide(ppca), x, steps=20, lr=1e160, seed=0)
    assert all(torch.equal(p, q) for p, q in zip(before, ppca.parameters(), strict=True))


def test_the_site_is_that_of_the_step_that_failed(x):
    """At later steps the parameters of the guide are NaN."""
    ppca = PPCA.like(x, 2, seed=0)
    ppca.noise_scale = 1e-9
    guide = AmortizedGuide(mlp(6, 4, seed=0).double().to(x.device), 2)
    with pytest.raises(FloatingPointError, match=r"at step 1: site '[xz]' of the model has"):
        fit_svi(ppca.model, guide, x * 1e149, steps=20, seed=0)
