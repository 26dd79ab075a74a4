"""Closed form, EM, PX-EM and variational EM, with and without missing values."""
