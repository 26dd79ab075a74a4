"""Tables of the tests, and the tolerance of results that several processes share."""

import math

import torch

TOLERANCE = 1e-12


def table(rows=101, columns=7, missing=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, 2, generator=generator, dtype=torch.float64)
    w = torch.randn(2, columns, generator=generator, dtype=torch.float64)
    x = z @ w + 0.8 * torch.randn(rows, columns, generator=generator, dtype=torch.float64) + 3.0
    x[torch.rand(rows, columns, generator=generator) < missing] = math.nan
    return x


def close(value, expected):
    torch.testing.assert_close(value, expected, rtol=TOLERANCE, atol=TOLERANCE)
