"""A pair of PPCA, and losses of any pair with their gradients."""

import torch
from pyro import poutine

from draws import draw
from ppl_vae.core.introspection import modules_of
from ppl_vae.guides.guides import PerDatumGuide
from ppl_vae.models.ppca import PPCA

D, K, N = 6, 2, 12


def ppca_pair(covariance="diagonal", N=N):
    """PPCA in general position, a guide with a free q per datum, and data; float64."""
    ppca = PPCA(D, K, seed=0).double().assign(loc=draw(D, seed=1), noise_scale=0.6)
    guide = PerDatumGuide(N, K, covariance=covariance).double()
    with torch.no_grad():
        for seed, p in enumerate(guide.parameters()):
            p.copy_(0.5 * draw(*p.shape, seed=seed + 2))
    return ppca, guide, ppca.sample(N, seed=3)


def parameters_of(model, guide, x, **keywords):
    """The parameters of a pair: those that Pyro sees, and those of networks closed over."""
    with torch.random.fork_rng(), torch.no_grad(), poutine.trace(param_only=True) as trace:
        guide(x, **keywords)
        model(x, **keywords)
    observed = [site["value"].unconstrained() for site in trace.trace.nodes.values()]
    around = [p for module in modules_of(model, guide) for p in module.parameters()]
    return list({id(p): p for p in (*observed, *around) if p.requires_grad}.values())


def value_and_gradients(objective, model, guide, x, **keywords):
    """A loss under a fixed seed and its gradients, those of the parameters that have one."""
    parameters = parameters_of(model, guide, x, **keywords)
    torch.manual_seed(0)
    value = objective.differentiable_loss(model, guide, x, **keywords)
    grads = torch.autograd.grad(value, parameters, allow_unused=True)
    assert any(g is not None and g.any() for g in grads)
    return value, grads
