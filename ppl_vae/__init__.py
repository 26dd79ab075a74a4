"""ppl_vae: probabilistic PCA and variational autoencoders as Pyro model/guide pairs."""
