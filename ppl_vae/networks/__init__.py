"""Neural networks for encoders and decoders."""
