"""The evidence p(x) of Bayesian models, and the comparison of numbers of latent dimensions."""
