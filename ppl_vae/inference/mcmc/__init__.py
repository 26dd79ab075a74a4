"""Markov chain Monte Carlo: Gibbs sampling and NUTS for the posterior of parameters."""
