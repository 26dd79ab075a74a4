"""Standard normal numbers of a seed, which leave the global generators alone."""

import torch


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0, dtype=torch.float64):
    """Standard normal numbers, drawn in the default dtype."""
    return torch.randn(*shape, generator=generator(seed)).to(dtype)
