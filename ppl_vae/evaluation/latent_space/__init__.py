"""What latent codes hold."""
