"""Encoders of pairs in scikit-learn: their codes, and classifiers that begin as they are."""

from collections.abc import Callable
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from ppl_vae.core.program import ProgramLike
from ppl_vae.core.results import FitResult
from ppl_vae.core.validation import ArrayLike, check_int, check_option
from ppl_vae.inference.svi.fit import fit_svi
from ppl_vae.interop.estimators import (
    DTYPES,
    CodeTransformer,
    RowsWithMissingValues,
    as_array,
    drawn_seed,
)
from ppl_vae.likelihoods.discrete import Categorical
from ppl_vae.models.autoencoder import Autoencoder
from ppl_vae.models.decoder_model import DecoderModel
from ppl_vae.models.supervised import ENCODERS, SupervisedEncoder

PairMaker: TypeAlias = Callable[[int, int], DecoderModel]
"""Makes a pair for rows of a width, with initial weights from a seed."""
COMPONENTS = 8
"""Latent dimensions of the autoencoder that is made where no pair is given, at most."""


class FeatureTransformer(CodeTransformer, BaseEstimator):
    """The codes of an autoencoder, a VAE or another pair, for pipelines and searches.

    ``transform`` is the mean of q(z | x), of an autoencoder f(x); ``inverse_transform`` is the
    mean of p(x | z). NaN marks a missing value, of which the encoder sees what the pair says
    (``missing=``). Columns should be of one scale, as for any network. There is no ``score``: what
    a pair maximises can be compared between pairs only if it bounds log p(x), and an autoencoder's
    does not.

    Args:
        model: a fitted pair (:class:`~ppl_vae.Autoencoder`, :class:`~ppl_vae.VAE`), which is used
            as it is: ``fit`` learns nothing, so that what was learned from other rows serves few.
            Or a callable that makes a pair of a width and a seed, such as
            ``lambda data_dim, seed: VAE.mlp(data_dim, 8, seed=seed)``, which ``fit`` fits in the
            numbers of X (float32 is faster). Or None, an ``Autoencoder.mlp`` that starts at the
            means of the columns, and sees the mask beside x if X has missing values.
        n_components: K, if model is None; None is 8, or D if that is less.
        epochs, batch_size, lr, device: of the fit of a pair that is made here, as
            :func:`ppl_vae.fit_svi` takes them. Fewer rows than a batch are one.
        random_state: of the initial weights, the order of rows and the draws of the fit; a
            number, a ``RandomState``, or ``None`` for numpy's global one.

    Attributes:
        model_: the pair, fitted.
        n_components_: K.
        n_features_in_: D.
        feature_names_in_: the columns of a DataFrame.
        fit_result_: how the fit went, a :class:`~ppl_vae.FitResult`; None where none was made.

    Example:
        >>> X = np.random.default_rng(0).normal(size=(50, 4))
        >>> FeatureTransformer(n_components=2, epochs=3).fit_transform(X).shape
        (50, 2)
    """

    model: DecoderModel | PairMaker | None
    n_components: int | None
    epochs: int
    batch_size: int
    lr: float
    device: str | torch.device
    random_state: int | np.random.RandomState | None
    model_: DecoderModel
    n_components_: int
    n_features_in_: int
    fit_result_: FitResult | None

    # scikit-learn wants arguments to be kept as they come, whatever they are, and checked by fit.
    def __init__(
        self,
        model: Any = None,
        n_components: Any = None,
        *,
        epochs: Any = 50,
        batch_size: Any = 128,
        lr: Any = 1e-3,
        device: Any = "auto",
        random_state: Any = 0,
    ) -> None:
        self.model = model
        self.n_components = n_components
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.device = device
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: Any = None) -> Self:
        """Fit the pair to what was observed of X; one that is fitted already is only checked.

        Args:
            X: (N, D); NaN marks a missing value.
            y: ignored.

        Raises:
            ValueError: if an argument of the constructor is none of those allowed; if the pair is
                for another width; if X is not 2-d, has infinite entries, or a row or column with
                nothing observed.
            TypeError: if model is no pair and makes none; if X is sparse.
        """
        X = self._validated(X, reset=True)
        if self.model is not None and self.n_components is not None:
            raise ValueError(
                "n_components= is for model=None; a pair of your own has latent dimensions of its "
                "own (search over model=)"
            )
        seed = drawn_seed(self.random_state)
        self.model_ = _pair(self.model, X, seed, self.n_components)
        self.n_components_, self.fit_result_ = self.model_.latent_dim, None
        if self.model_ is not self.model:
            self.fit_result_ = _fit(self, self.model_.model, self.model_.guide, X, seed)
        return self

    def _codes(self, X: np.ndarray) -> Float[Tensor, "N K"]:
        return self.model_.features(X)

    def _decoded(self, X: np.ndarray) -> Float[np.ndarray, "N D"]:
        return as_array(self.model_.decode(torch.as_tensor(X)).mean)


class EncoderClassifier(ClassifierMixin, RowsWithMissingValues, BaseEstimator):
    """A classifier that begins as the encoder of a pair, which may have seen rows without labels.

    p(y | x) = softmax(A f(x) + b), with f(x) the mean of the code, by maximum likelihood
    (:class:`~ppl_vae.SupervisedEncoder`). NaN in X is a missing value, of which f sees what the
    pair says.

    Args:
        model: a fitted pair, which is left as it is; a callable that makes one of a width and a
            seed; or None, an ``Autoencoder.mlp`` of 8 latent dimensions. Those made here begin
            with random weights, in the numbers of X (float32 is faster).
        encoder: ``"fine-tuned"``: f begins with the pair's weights and trains; ``"frozen"``: it
            keeps them; ``"scratch"``: the same network begins anew.
        epochs, batch_size, lr, device: of the fit, as :func:`ppl_vae.fit_svi` takes them. Fewer
            rows than a batch are one.
        random_state: of weights that are drawn and the order of rows; a number, a
            ``RandomState``, or ``None`` for numpy's global one.

    Attributes:
        classes_: the classes, sorted.
        network_: the :class:`~ppl_vae.SupervisedEncoder`.
        n_features_in_: D.
        feature_names_in_: the columns of a DataFrame.
        fit_result_: how the fit went, a :class:`~ppl_vae.FitResult`.

    Example:
        >>> X = np.random.default_rng(0).normal(size=(50, 4))
        >>> EncoderClassifier(epochs=3).fit(X, X[:, 0] > 0).predict_proba(X).shape
        (50, 2)
    """

    model: DecoderModel | PairMaker | None
    encoder: str
    epochs: int
    batch_size: int
    lr: float
    device: str | torch.device
    random_state: int | np.random.RandomState | None
    classes_: np.ndarray
    network_: SupervisedEncoder
    n_features_in_: int
    fit_result_: FitResult

    # scikit-learn wants arguments to be kept as they come, whatever they are, and checked by fit.
    def __init__(
        self,
        model: Any = None,
        *,
        encoder: Any = "fine-tuned",
        epochs: Any = 100,
        batch_size: Any = 32,
        lr: Any = 3e-3,
        device: Any = "auto",
        random_state: Any = 0,
    ) -> None:
        self.model = model
        self.encoder = encoder
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.device = device
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Learn the classes of rows.

        Args:
            X: (N, D); NaN marks a missing value.
            y: a class for each row, (N,).

        Raises:
            ValueError: if an argument of the constructor is none of those allowed; if the pair is
                for another width; if y has fewer than two classes; if X is not 2-d, has infinite
                entries, or a row with nothing observed; what
                :class:`~ppl_vae.SupervisedEncoder` refuses.
            TypeError: if model is no pair and makes none; if X is sparse.
        """
        check_option("encoder", self.encoder, ENCODERS)
        holes: Any = {"ensure_all_finite": "allow-nan"}
        X, y = validate_data(self, X, y, dtype=DTYPES, **holes)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError("y must have at least two classes; it has one class")
        seed = drawn_seed(self.random_state)
        pair, likelihood = _pair(self.model, X, seed, None), Categorical(len(self.classes_))
        self.network_ = SupervisedEncoder(pair, likelihood, encoder=self.encoder, seed=seed)
        rows = self.network_.rows(X, codes)
        self.fit_result_ = _fit(self, self.network_.model, self.network_.guide, rows, seed)
        return self

    def predict_proba(self, X: ArrayLike) -> Float[np.ndarray, "N C"]:
        """p(y | x) of each class, in the order of ``classes_``.

        Raises:
            ValueError: if X has another width or infinite entries, or a row with nothing observed.
        """
        check_is_fitted(self)
        density: Any = self.network_.predict(self._validated(X))
        return as_array(density.base_dist.probs[:, 0])

    def predict(self, X: ArrayLike) -> np.ndarray:
        """The most probable class of each row.

        Raises:
            ValueError: as :meth:`predict_proba`.
        """
        likeliest = self.predict_proba(X).argmax(1)
        return self.classes_[likeliest]


def _pair(model: Any, X: np.ndarray, seed: int, n_components: Any) -> DecoderModel:
    """The pair itself, or a new one for these rows, in their numbers."""
    width, dtype = X.shape[1], torch.as_tensor(X[:0].copy()).dtype
    if model is None:
        size = min(COMPONENTS, width) if n_components is None else n_components
        missing = "zeros+mask" if np.isnan(X).any() else "zeros"
        size = check_int("n_components", size)
        return Autoencoder.mlp(width, size, missing=missing, seed=seed).to(dtype).center(X)
    made = model if isinstance(model, DecoderModel) else _made(model, width, seed).to(dtype)
    if made.data_dim != width:
        raise ValueError(f"X has {width} columns, and the pair is for {made.data_dim}")
    return made


def _made(model: Any, width: int, seed: int) -> DecoderModel:
    made = model(width, seed) if callable(model) else model
    if not isinstance(made, DecoderModel):
        raise TypeError(
            "model must be a pair such as an Autoencoder or a VAE, a callable that makes one of "
            f"(data_dim, seed), or None; got {made!r}"
        )
    return made


def _fit(
    estimator: Any, model: ProgramLike, guide: ProgramLike, rows: ArrayLike, seed: int
) -> FitResult:
    size = min(check_int("batch_size", estimator.batch_size), len(rows))
    how = {"epochs": estimator.epochs, "lr": estimator.lr, "device": estimator.device}
    return fit_svi(model, guide, rows, batch_size=size, seed=seed, progress=False, **how)
