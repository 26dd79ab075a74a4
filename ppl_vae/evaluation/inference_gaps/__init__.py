"""What a guide loses: the approximation gap and the amortization gap."""
