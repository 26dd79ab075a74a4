"""Steps of Pyro programs captured as tensor graphs and compiled."""
