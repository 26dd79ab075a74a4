"""Conversion to and from the types of ArviZ and scikit-learn."""
