"""NUTS for BayesianPPCA on its integrated likelihood."""

