"""The atoms of a dictionary, sorted by their use."""

import numpy as np
import pytest
from dictionaries import SIGMA, D, K, parts, planted, sklearn_lasso, with_free_codes

from ppl_vae import Autoencoder, mlp
from ppl_vae.evaluation.latent_space.atoms import atoms


def test_atoms_are_sorted_by_use():
    x, _ = planted()
    model = with_free_codes(x, K, 1.0).center(x)
    W, b, _ = parts(model)
    found = atoms(model, x, tolerance=1e-7)
    codes = sklearn_lasso(x - b, W, SIGMA**2)
    order = np.argsort(-abs(codes).mean(0), kind="stable")
    assert found.index.tolist() == order.tolist()
    np.testing.assert_allclose(found.mean_abs, abs(codes).mean(0)[order], atol=1e-5)
    np.testing.assert_allclose(found.usage, (codes != 0).mean(0)[order])
    signs = np.where(codes.sum(0) < 0, -1, 1)
    np.testing.assert_allclose(found.atoms, (W * signs).T[order], rtol=1e-12)
    assert (signs < 0).any() and (signs > 0).any()
    used = (codes != 0).sum(1).mean()
    assert f"{used:.1f} used per datum, 0 never used" in repr(found)


def test_deep_decoders_have_no_atoms():
    deep = Autoencoder(encoder=mlp(D, K), decoder=mlp(K, D, (3,)), data_dim=D, latent_dim=K)
    with pytest.raises(ValueError, match="only a decoder of one linear layer"):
        atoms(deep, planted()[0])
