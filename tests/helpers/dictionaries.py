"""Sparse-coding data from a planted dictionary, and autoencoders that learn dictionaries."""

import oracles
import torch
from sklearn.decomposition import sparse_encode
from torch import nn

from ppl_vae import Autoencoder, Gaussian, PerDatumGuide
from ppl_vae.networks.sparse_layers import NormalizedColumns

D, K = 6, 9
SIGMA = 0.3


def planted(seed=0, *, N=80, share=0.25, noise=0.05, width=D, number=K):
    return oracles.planted_dictionary(N, width, number, share, noise, seed)


def with_free_codes(x, latent_dim, penalty, *, sigma=SIGMA, seed=0):
    """An autoencoder with a free code for each row of x and a random bias."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        decoder = nn.Sequential(NormalizedColumns(nn.Linear(latent_dim, x.shape[1]), "unit"))
    made = Autoencoder(
        decoder=decoder,
        guide=PerDatumGuide(len(x), latent_dim, covariance="delta"),
        likelihood=Gaussian(sigma),
        prior="laplace",
        penalty=penalty,
        data_dim=x.shape[1],
        latent_dim=latent_dim,
    )
    return made.double()


def parts(autoencoder):
    """W, b and the codes, as numpy arrays."""
    layer = autoencoder.decoder[0]
    return [t.detach().numpy().copy() for t in (layer.weight, layer.bias, autoencoder.guide.loc)]


def sklearn_lasso(x, W, alpha):
    """The lasso codes of scikit-learn, by coordinate descent."""
    dictionary = W.T.copy()
    return sparse_encode(x, dictionary, algorithm="lasso_cd", alpha=alpha, max_iter=100_000)
