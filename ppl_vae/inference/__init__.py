"""How it is fitted: closed form, EM, variational EM, SVI."""
