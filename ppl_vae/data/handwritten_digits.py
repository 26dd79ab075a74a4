"""scikit-learn's handwritten digits."""

import numpy as np
from jaxtyping import Float, Int


def digits() -> Float[np.ndarray, "1797 64"]:
    """scikit-learn's handwritten digits, 8 x 8 pixels, each in 0..1 (sixteenths)."""
    return labelled_digits()[0]


def labelled_digits() -> tuple[Float[np.ndarray, "1797 64"], Int[np.ndarray, "1797"]]:
    """The digits as :func:`digits` returns them, and the class 0..9 of each."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return np.asarray(pixels) / 16, np.asarray(labels)
