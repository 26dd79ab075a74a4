"""Any Pyro step as one recorded, compiled function."""
