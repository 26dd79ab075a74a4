"""The names of models and likelihoods, for the command line, which starts without torch."""

MODEL_NAMES = {
    "ppca": "probabilistic PCA",
    "factor-analysis": "factor analysis",
    "bayesian-ppca": "Bayesian probabilistic PCA",
    "bayesian-factor-analysis": "Bayesian factor analysis",
    "vae": "variational autoencoder",
    "iwae": "importance-weighted autoencoder",
    "autoencoder": "autoencoder",
}
"""What can be fitted to a table, with the name that is printed."""
NETWORK_MODELS = ("vae", "iwae", "autoencoder")
"""Models with an encoder and a decoder, which are fitted by SVI."""
LIKELIHOOD_NAMES = (
    "gaussian",
    "bernoulli",
    "continuous-bernoulli",
    "poisson",
    "multinomial",
    "categorical",
)
"""The likelihoods of models with a decoder."""
