"""What ``ppl-vae report`` does."""
