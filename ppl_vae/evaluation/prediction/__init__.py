"""Predictions of data: imputation, masked cross-validation, denoising, classification."""
