"""Diagnostics of latent codes: collapse, spectrum, subspaces, embeddings and traversals."""
