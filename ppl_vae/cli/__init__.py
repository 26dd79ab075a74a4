"""The command line, ``ppl-vae``."""
