"""One step of a stochastic fit: eager, recorded or compiled, and what it does to the
parameters."""
