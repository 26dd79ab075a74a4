"""How good it is: log-likelihoods, gaps, subspaces."""
