"""The names of the stages, for the command line, which starts without importing torch."""

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
    "variational-bayes",
    "posterior",
    "nuts",
)
