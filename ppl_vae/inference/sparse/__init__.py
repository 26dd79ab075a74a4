"""Linear autoencoders and sparse coding: PCA, the lasso, MAP codes and dictionary learning."""
