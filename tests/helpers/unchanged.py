"""Pairs that an evaluation must leave as they were."""

from contextlib import contextmanager

import pyro
import torch

from ppl_vae.core.introspection import modules_of


@contextmanager
def assert_unchanged(model, guide, *, new_parameters=()):
    """Assert that the block leaves a pair and the global state as they were.

    ``new_parameters`` are the names of bare parameters, which the parameter store may gain.
    """
    pyro.param("another program's", torch.tensor(3.0))
    modules = modules_of(model, guide)
    flags = [part.training for module in modules for part in module.modules()]
    tensors = [t for module in modules for t in module.state_dict().values()]
    before, rng_state = [t.clone() for t in tensors], torch.get_rng_state()
    yield
    assert torch.equal(rng_state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    assert [part.training for module in modules for part in module.modules()] == flags
    assert all(p.grad is None for module in modules for p in module.parameters())
    assert set(pyro.get_param_store().keys()) == {"another program's", *new_parameters}
