"""The approximation gap and the amortization gap of a guide."""
