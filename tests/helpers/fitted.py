"""The parameters of a PPCA as arrays, and a comparison of arrays."""

import numpy as np
import torch


def parameters(ppca):
    """Mean (D,), loadings (D, K) and noise variance, () or (D,)."""
    loc, loadings, scale = (
        p.detach().numpy().copy() for p in (ppca.loc, ppca.loadings, ppca.noise_scale)
    )
    return loc, loadings, scale**2


def assert_close(actual, expected, tolerance=1e-10):
    """Assert that two arrays agree, to a tolerance that is both relative and absolute."""
    actual = actual.detach().numpy() if isinstance(actual, torch.Tensor) else actual
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)
