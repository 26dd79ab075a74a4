"""What is assumed: the generative models."""
