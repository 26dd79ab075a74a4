"""The models from probabilistic PCA to the VAE, fitted and compared."""
