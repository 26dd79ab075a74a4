"""scikit-learn estimators from the encoders of pairs: codes as features, and classifiers."""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from ppl_vae.core.fit_result import FitResult
from ppl_vae.core.validation import ArrayLike, check_int, check_option
from ppl_vae.inference.svi.fit import fit_svi
from ppl_vae.interop.estimators import (
    DTYPES,
    CodeTransformer,
    RowsWithMissingValues,
    as_array,
    as_input,
    drawn_seed,
)
from ppl_vae.likelihoods.discrete import Categorical
from ppl_vae.models.autoencoder import Autoencoder
from ppl_vae.models.decoder_model import DecoderModel
from ppl_vae.models.supervised import ENCODERS, SupervisedEncoder

PairFactory: TypeAlias = Callable[[int, int], DecoderModel]
"""A function of (data_dim, seed) that returns a pair with initial weights from the seed."""
DEFAULT_COMPONENTS = 8
"""The largest default latent dimension of the autoencoder that is built if no pair is given."""


@dataclass(eq=False, repr=False)
class FeatureTransformer(CodeTransformer, BaseEstimator):
    """The codes of an autoencoder, a VAE or another pair, for pipelines and searches.

    ``transform`` is the mean of q(z | x), for an autoencoder f(x); ``inverse_transform`` is the
    mean of p(x | z). NaN marks a missing value, which the encoder receives in the way that the
    pair specifies (``missing=``). Columns should have similar scales, as for any network. There is
    no ``score``: the objectives of pairs are comparable only if they are bounds on log p(x), and
    that of an autoencoder is not.

    Args:
        model: one of three. A fitted pair (:class:`~ppl_vae.Autoencoder`, :class:`~ppl_vae.VAE`):
            ``fit`` does not train it, so that an encoder trained on other rows can be used where
            rows are few. A callable of (data_dim, seed) that returns a pair, such as
            ``lambda data_dim, seed: VAE.mlp(data_dim, 8, seed=seed)``: ``fit`` trains it in the
            dtype of X (float32 is faster). None: an ``Autoencoder.mlp`` that starts at the means
            of the columns; its encoder also receives the mask if X has missing values.
        n_components: K, if model is None; by default 8, or D if that is smaller.
        epochs, batch_size, lr, device: arguments of :func:`ppl_vae.fit_svi` for a pair that is
            trained here. The minibatch is at most all rows.
        random_state: seed of the initial weights, the order of rows and the draws of the fit; an
            integer, a ``RandomState``, or ``None`` for numpy's global one.

    Attributes:
        model_: the fitted pair.
        n_components_: K.
        n_features_in_: D.
        feature_names_in_: the columns of a DataFrame.
        fit_result_: the :class:`~ppl_vae.core.FitResult` of the fit; None if the pair was not
            trained.

    Example:
        >>> X = np.random.default_rng(0).normal(size=(50, 4))
        >>> FeatureTransformer(n_components=2, epochs=3).fit_transform(X).shape
        (50, 2)
    """

    # scikit-learn requires the constructor to store its arguments unchanged; fit checks them.
    model: Any = None
    n_components: Any = None
    _: KW_ONLY
    epochs: Any = 50
    batch_size: Any = 128
    lr: Any = 1e-3
    device: Any = "auto"
    random_state: Any = 0

    def fit(self, X: ArrayLike, y: Any = None) -> Self:
        """Fit the pair to the observed values of X; a pair fitted already is only checked.

        Args:
            X: (N, D); NaN marks a missing value.
            y: ignored.

        Raises:
            ValueError: if an argument of the constructor is invalid; if the pair has another data
                dimension; if X is not 2-d, has infinite entries, or a row or column without
                observed values.
            TypeError: if model neither is nor returns a pair; if X is sparse.
        """
        X = self._validated(X, reset=True)
        if self.model is not None and self.n_components is not None:
            raise ValueError(
                "n_components= is for model=None; a given pair determines its own latent "
                "dimension (search over model= instead)"
            )
        seed = drawn_seed(self.random_state)
        self.model_ = _pair(self.model, X, seed, self.n_components)
        self.n_components_, self.fit_result_ = self.model_.latent_dim, None
        if self.model_ is not self.model:
            self.fit_result_ = _fit(self, self.model_, X, seed)
        return self

    def _codes(self, X: np.ndarray) -> Float[Tensor, "N K"]:
        return self.model_.features(X)

    def _decoded(self, X: np.ndarray) -> Float[np.ndarray, "N D"]:
        return as_array(self.model_.decode(torch.as_tensor(X)).mean)


@dataclass(eq=False, repr=False)
class EncoderClassifier(ClassifierMixin, RowsWithMissingValues, BaseEstimator):
    """A classifier that is initialised with the encoder of a pair, trained without labels.

    p(y | x) = softmax(A f(x) + b), with f(x) the mean of the code, fitted by maximum likelihood
    (:class:`~ppl_vae.models.SupervisedEncoder`). NaN in X is a missing value, which f receives in
    the way that the pair specifies.

    Args:
        model: a fitted pair, which is not changed; a callable of (data_dim, seed) that returns
            one; or None, an ``Autoencoder.mlp`` with 8 latent dimensions. A pair that is built
            here has random initial weights, in the dtype of X (float32 is faster).
        encoder: ``"fine-tuned"``: f starts from the weights of the pair and is trained;
            ``"frozen"``: f keeps these weights; ``"scratch"``: f has the same architecture and
            starts from random weights.
        epochs, batch_size, lr, device: arguments of :func:`ppl_vae.fit_svi`. The minibatch is at
            most all rows.
        random_state: seed of random weights and of the order of rows; an integer, a
            ``RandomState``, or ``None`` for numpy's global one.

    Attributes:
        classes_: the classes, sorted.
        network_: the :class:`~ppl_vae.models.SupervisedEncoder`.
        n_features_in_: D.
        feature_names_in_: the columns of a DataFrame.
        fit_result_: the :class:`~ppl_vae.core.FitResult` of the fit.

    Example:
        >>> X = np.random.default_rng(0).normal(size=(50, 4))
        >>> EncoderClassifier(epochs=3).fit(X, X[:, 0] > 0).predict_proba(X).shape
        (50, 2)
    """

    # scikit-learn requires the constructor to store its arguments unchanged; fit checks them.
    model: Any = None
    _: KW_ONLY
    encoder: Any = "fine-tuned"
    epochs: Any = 100
    batch_size: Any = 32
    lr: Any = 3e-3
    device: Any = "auto"
    random_state: Any = 0

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Fit the classifier to rows and their classes.

        Args:
            X: (N, D); NaN marks a missing value.
            y: the class of each row, (N,).

        Raises:
            ValueError: if an argument of the constructor is invalid; if the pair has another data
                dimension or is not supported by :class:`~ppl_vae.models.SupervisedEncoder`; if y
                has fewer than two classes; if X is not 2-d, has infinite entries, or a row without
                observed values.
            TypeError: if model neither is nor returns a pair; if X is sparse.
        """
        check_option("encoder", self.encoder, ENCODERS)
        X, y = validate_data(self, as_input(X), y, dtype=DTYPES, ensure_all_finite="allow-nan")
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError("y must have at least two classes; it has one class")
        seed = drawn_seed(self.random_state)
        pair, likelihood = _pair(self.model, X, seed, None), Categorical(len(self.classes_))
        self.network_ = SupervisedEncoder(pair, likelihood, encoder=self.encoder, seed=seed)
        rows = self.network_.rows(X, codes)
        self.fit_result_ = _fit(self, self.network_, rows, seed)
        return self

    def predict_proba(self, X: ArrayLike) -> Float[np.ndarray, "N C"]:
        """p(y | x) of each class, in the order of ``classes_``.

        Raises:
            ValueError: if X has the wrong number of columns, infinite entries, or a row without
                observed values.
        """
        check_is_fitted(self)
        density: Any = self.network_.predict(self._validated(X))
        return as_array(density.base_dist.probs[:, 0])

    def predict(self, X: ArrayLike) -> np.ndarray:
        """The most probable class of each row.

        Raises:
            ValueError: as :meth:`predict_proba`.
        """
        most_probable = self.predict_proba(X).argmax(1)
        return self.classes_[most_probable]


def _pair(model: Any, X: np.ndarray, seed: int, n_components: Any) -> DecoderModel:
    """The given pair, or a new one for these rows, in their dtype."""
    width, dtype = X.shape[1], torch.as_tensor(X[:0].copy()).dtype
    if model is None:
        size = min(DEFAULT_COMPONENTS, width) if n_components is None else n_components
        missing = "zeros+mask" if np.isnan(X).any() else "zeros"
        size = check_int("n_components", size)
        return Autoencoder.mlp(width, size, missing=missing, seed=seed).to(dtype).center(X)
    pair = model if isinstance(model, DecoderModel) else _build(model, width, seed).to(dtype)
    if pair.data_dim != width:
        raise ValueError(f"X has {width} columns, but the pair has data_dim={pair.data_dim}")
    return pair


def _build(model: Any, width: int, seed: int) -> DecoderModel:
    pair = model(width, seed) if callable(model) else model
    if not isinstance(pair, DecoderModel):
        raise TypeError(
            "model must be a pair such as an Autoencoder or a VAE, a callable of "
            f"(data_dim, seed) that returns one, or None; got {pair!r}"
        )
    return pair


def _fit(
    estimator: Any, pair: DecoderModel | SupervisedEncoder, rows: ArrayLike, seed: int
) -> FitResult:
    return fit_svi(
        pair.model,
        pair.guide,
        rows,
        epochs=estimator.epochs,
        batch_size=min(check_int("batch_size", estimator.batch_size), len(rows)),
        lr=estimator.lr,
        device=estimator.device,
        seed=seed,
        progress=False,
    )
