"""The rows of each step, and the objective of a pair on them."""
