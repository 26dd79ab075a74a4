"""Estimates of the marginal log-likelihood log p(x), and their reliability."""
