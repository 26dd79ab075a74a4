"""The names of the lineage's stages, for the command line, which is to start without torch."""

STAGE_NAMES = (
    "pca",
    "linear-autoencoder",
    "closed-form",
    "em",
    "px-em",
    "variational-em",
    "per-datum-svi",
    "exact-svi",
    "linear-amortized",
    "deep-amortized",
    "isotropic-q",
    "unit-q",
    "vae",
    "iwae",
    "score-vae",
)
