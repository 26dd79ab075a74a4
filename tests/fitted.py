"""A fitted PPCA as arrays, and arrays compared."""

import numpy as np
import torch


def parameters(ppca):
    """loc, loadings and noise variance: (D,), (D, K), () or (D,)."""
    loc, loadings, scale = (
        p.detach().numpy().copy() for p in (ppca.loc, ppca.loadings, ppca.noise_scale)
    )
    return loc, loadings, scale**2


def close(actual, expected, tolerance=1e-10):
    """Assert that they agree, to a tolerance both relative and absolute."""
    actual = actual.detach().numpy() if isinstance(actual, torch.Tensor) else actual
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)
