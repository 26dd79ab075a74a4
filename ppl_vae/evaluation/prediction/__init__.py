"""Predictions of data: missing values, noise, labels."""
