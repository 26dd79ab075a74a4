"""Linear-Gaussian models: p(z | x), log p(x) and the statistics they depend on, exactly."""
