"""The optimizer of local guides."""

import torch

from ppl_vae.evaluation.local_guides.cosine_descent import cosine_rates, descend


def test_steps_are_those_of_torch():
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(size, generator=generator) for size in (7, 3)]
    target = torch.linspace(0, 2, 7)

    def gradients(parameters):
        first, second = parameters
        first.grad = (first - target) * second.detach().norm()
        second.grad = second.sin() * first.detach().sum()

    own = [start.clone().requires_grad_() for start in starts]
    theirs = [start.clone().requires_grad_() for start in starts]
    rates = cosine_rates(0.1, 50)
    with torch.no_grad():
        descend(own, rates, lambda: gradients(own))
        optimizer = torch.optim.Adam(theirs, lr=1.0)
        for rate in rates:
            optimizer.param_groups[0]["lr"] = rate
            gradients(theirs)
            optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(own, theirs, strict=True))
    assert not torch.equal(own[0], starts[0])
