"""What a pair of a model and a guide is, and what every module needs."""
