"""PCA, the lasso and dictionaries."""
