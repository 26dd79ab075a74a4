"""PPCA and factor analysis as a scikit-learn transformer."""

import warnings
from dataclasses import KW_ONLY, dataclass
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted

from ppl_vae.core.arrays.frame_labels import Frame
from ppl_vae.core.arrays.schema import RowLabels
from ppl_vae.core.validation import ArrayLike, check_int, check_option
from ppl_vae.data.column_stats import ColumnStats
from ppl_vae.data.sources.row_blocks import RowBlocks
from ppl_vae.inference.em.fit import fit_closed_form, fit_em
from ppl_vae.interop.estimators import CodeTransformer, as_array, cast_to, drawn_seed
from ppl_vae.models.linear.sufficient_statistics import SampleCovariance, summarize_table
from ppl_vae.models.ppca import NOISES, PPCA


@dataclass(eq=False, repr=False)
class PPCATransformer(CodeTransformer, BaseEstimator):
    """Probabilistic PCA, or factor analysis, for pipelines and searches; X may have missing
    values.

    x = W z + mu + noise with z ~ N(0, I_K), fitted by maximum likelihood: in closed form if the
    noise is isotropic and X complete, by PX-EM otherwise. ``transform`` is the mean of p(z | x),
    which for isotropic noise is the score of PCA on component k, times sqrt(l_k - sigma^2) / l_k,
    with l_k the variance along it. NaN marks a missing value, which is integrated out. Sums and
    parameters are in float64; ``transform``, ``inverse_transform`` and ``impute`` return float32
    for float32. Variances have the denominator N, not N - 1.

    Standard deviations and draws of ``model_.impute`` take the fitted parameters as known: with
    few rows, intervals based on them are too narrow (see
    :class:`~ppl_vae.core.imputed.Imputation`). If the observed values do not determine the
    covariance of two columns, because too few rows and columns connect them, ``notes_`` name the
    columns, and ``impute`` warns.

    Args:
        n_components: K, which must be smaller than the rank R of the centred data: with K >= R
            the noise would be zero and the likelihood infinite. ``None`` chooses the largest K
            that leaves some noise: R - 1; with missing values the largest K < min(D, N - 1) for
            which the number of observed values in excess of K per row exceeds the (K + 1) (D - K)
            parameters of K axes and a mean. If even one component is too many, one is used, and
            the variance is divided equally between its axis and the noise. For a single column
            (also with ``n_components=1``) every division maximises the likelihood; for more
            columns there is no maximum, and a warning is issued.
        noise: ``"isotropic"``: PPCA, or ``"diagonal"``: factor analysis.
        tol: PX-EM stops when the remaining gain, in nats per datum, is below this.
        max_iter: largest number of iterations of PX-EM.
        n_init: number of starts of PX-EM, of which the fit with the highest likelihood is kept;
            more than one is useful for ``noise="diagonal"`` and for missing values.
        random_state: seed of the initial loadings of PX-EM; an integer, a ``RandomState``, or
            ``None`` for numpy's global one.

    Attributes:
        components_: W', (K, D), with rows along the principal axes, longest first, each with its
            largest entry positive. The axes of PCA are these, normalised to length one.
        mean_: mu, (D,).
        noise_variance_: sigma^2, a float; (D,) if the noise is diagonal.
        n_components_: K.
        n_features_in_: D.
        feature_names_in_: the columns of a DataFrame.
        n_iter_: iterations of PX-EM; 1 for the closed form.
        notes_: caveats on the fit, such as constant columns.
        model_: the fitted :class:`~ppl_vae.PPCA`, in float64.

    References:
        Tipping, Bishop: Probabilistic principal component analysis (1999), equations 6 to 8.
        Rubin, Thayer: EM algorithms for ML factor analysis (1982).

    Example:
        >>> X = np.random.default_rng(0).normal(size=(50, 4))
        >>> PPCATransformer(n_components=2).fit_transform(X).shape
        (50, 2)
    """

    # scikit-learn requires the constructor to store its arguments unchanged; fit checks them.
    n_components: Any = None
    _: KW_ONLY
    noise: Any = "isotropic"
    tol: Any = 1e-6
    max_iter: Any = 10_000
    n_init: Any = 1
    random_state: Any = 0

    def fit(self, X: ArrayLike, y: Any = None) -> Self:
        """Fit the model to the observed values of X.

        Args:
            X: (N, D), N >= 2; NaN marks a missing value.
            y: ignored.

        Warns:
            UserWarning: if the precision of X is too low for a column; if n_components is None and
                X, with several columns, does not determine one component and the noise.
            ConvergenceWarning: if PX-EM stopped after max_iter iterations.

        Raises:
            ValueError: if an argument of the constructor is invalid; if n_components is not
                smaller than the rank of the centred data, or so large that the observed values
                leave no noise; if X is not 2-d, has fewer than two rows, infinite entries, a
                column without observed values, or constant columns only; if the noise is
                diagonal and a column is constant.
            TypeError: if X is sparse.
        """
        noise = check_option("noise", self.noise, NOISES)
        check_int("max_iter", self.max_iter)
        check_int("n_init", self.n_init)
        if not self.tol >= 0:
            raise ValueError(f"tol must be >= 0, in nats per datum; got {self.tol!r}")
        X = self._validated(X, reset=True, ensure_min_samples=2)
        columns, covariance = summarize_table(RowBlocks(X))
        if bool(columns.constant.all()):
            raise ValueError("X has only constant columns, so there is no variance to explain")
        latent_dim = self._latent_dim(X, columns, covariance)
        if not latent_dim:
            columns.check(diagonal=noise == "diagonal")
            ppca = _with_half_variance(X, columns, noise)
            self.n_iter_, self.notes_ = 1, columns.notes()
        elif covariance is not None and noise == "isotropic":
            ppca = PPCA(X.shape[1], latent_dim, seed=0).double()
            found = fit_closed_form(ppca, X)
            self.n_iter_, self.notes_ = found.steps, found.notes
        else:
            ppca = self._fitted_by_em(X, latent_dim)
        self._store(ppca.canonical())
        return self

    def _latent_dim(
        self, X: np.ndarray, columns: ColumnStats, covariance: SampleCovariance | None
    ) -> int:
        # K; or 0 if one component is used although the data do not determine its variance.
        rank, bound = (covariance or columns).rank(), "" if covariance else "at most "
        if self.n_components is None:
            return rank - 1 if covariance else _max_components(X, rank)
        latent_dim = check_int("n_components", self.n_components)
        if latent_dim == X.shape[1] == 1:
            return 0
        if latent_dim >= rank:
            raise ValueError(
                f"n_components must be smaller than the rank of the centred data, {bound}{rank} "
                f"(X has shape {X.shape}): the noise would be zero; got {latent_dim}. "
                "n_components=None chooses the largest"
            )
        return latent_dim

    def _fitted_by_em(self, X: np.ndarray, latent_dim: int) -> PPCA:
        seed = drawn_seed(self.random_state)
        ppca = PPCA.like(X, latent_dim, noise=self.noise, seed=seed).double()
        try:
            found = fit_em(ppca, X, tol=self.tol, max_iterations=self.max_iter, starts=self.n_init)
        except ValueError as error:  # which names the argument of PPCA
            raise ValueError(str(error).replace("latent_dim", "n_components")) from error
        if not found.converged:
            warnings.warn(
                f"PX-EM stopped {found.stopped.replace('max_iterations', 'max_iter')}, at least "
                f"{found.certificate:.2g} nats per datum below its maximum (tol={self.tol:g}); "
                "raise max_iter or tol",
                ConvergenceWarning,
                stacklevel=3,
            )
        self.n_iter_, self.notes_ = found.steps, found.notes
        return ppca

    def _store(self, ppca: PPCA) -> None:
        self.model_, self.n_components_ = ppca, ppca.latent_dim
        self.components_ = as_array(ppca.loadings.mT)
        self.mean_ = as_array(ppca.loc)
        variance = as_array(ppca.noise_scale.square())
        self.noise_variance_ = variance if variance.ndim else float(variance)

    def _codes(self, X: np.ndarray) -> torch.Tensor:
        return self.model_.posterior_mean(X)

    def _decoded(self, X: np.ndarray) -> np.ndarray:
        return X @ self.components_ + self.mean_

    def impute(self, X: ArrayLike) -> Float[np.ndarray, "N D"] | Frame:
        """Replace each missing value by its mean given the observed values of its row.

        A row with nothing observed gets the means of the columns. Of a data frame the result is a
        frame with its index and columns. ``model_.impute(X)`` also returns standard deviations and
        draws; both take the fitted parameters as known.

        Warns:
            UserWarning: if imputed values depend on covariances that the data of the fit did not
                determine, so that they are arbitrary.

        Raises:
            ValueError: as ``transform``.
        """
        check_is_fitted(self)
        labels, X = RowLabels.of(X), self._validated(X)
        found = self.model_.impute(X)
        for note in found.notes:
            warnings.warn(
                f"{int(found.sd.isnan().sum())} of the imputed values are arbitrary: {note}",
                stacklevel=2,
            )
        return labels.data(cast_to(X.dtype, as_array(found.mean), "imputed values"))

    def score_samples(self, X: ArrayLike) -> Float[np.ndarray, " N"]:
        """The exact log density of the observed values of each row, in nats.

        It is 0 for a row with nothing observed.

        Raises:
            ValueError: as ``transform``.
        """
        check_is_fitted(self)
        with torch.no_grad():
            return as_array(self.model_.log_likelihood(self._validated(X)))

    def score(self, X: ArrayLike, y: Any = None) -> float:
        """The mean of :meth:`score_samples`, in nats per datum, which a search maximises.

        Rows with nothing observed are left out of it.

        Args:
            X: (N, D); NaN marks a missing value.
            y: ignored.

        Raises:
            ValueError: as ``transform``.
        """
        check_is_fitted(self)
        X = self._validated(X)
        some = ~np.isnan(X).all(1)
        if not some.any():
            raise ValueError("X has no observed value, so that there is nothing to score")
        return float(as_array(self.model_.log_likelihood(X[some])).mean())

    def sample(self, n_samples: int = 1, random_state: Any = None) -> Float[np.ndarray, "S D"]:
        """Draw from p(x).

        Args:
            n_samples: the number of draws.
            random_state: seed of the draws; an integer, a ``RandomState``, or ``None`` for numpy's
                global one.

        Raises:
            ValueError: if n_samples is not a whole number >= 1.
        """
        check_is_fitted(self)
        check_int("n_samples", n_samples)
        seed = drawn_seed(random_state)
        return as_array(self.model_.sample(n_samples, seed=seed))

    def get_covariance(self) -> Float[np.ndarray, "D D"]:
        """W W' + Psi, the covariance of x under the model."""
        check_is_fitted(self)
        return as_array(self.model_.covariance())


def _max_components(X: np.ndarray, rank: int) -> int:
    # K latent variables fit K values of each row without noise; the number of observed values in
    # excess of these must exceed that of the parameters of a K-dimensional plane, (K + 1) (D - K).
    observed, width = (~np.isnan(X)).sum(1), X.shape[1]
    fits = (k for k in range(1, rank) if (observed - k).clip(0).sum() > (k + 1) * (width - k))
    return max(fits, default=0)


def _with_half_variance(X: np.ndarray, columns: ColumnStats, noise: str) -> PPCA:
    # One component along the first principal axis with half of its variance; the rest is noise.
    if X.shape[1] > 1:
        warnings.warn(
            f"X, of shape {X.shape}, does not determine one component and the noise, so the "
            "likelihood has no maximum; half of the variance was assigned to the noise",
            stacklevel=3,
        )
    filled = np.where(np.isnan(X), columns.mean.numpy(force=True), X)
    values, vectors = SampleCovariance.of(filled).eigh()
    variance = columns.variance if noise == "diagonal" else columns.variance.mean()
    loadings = vectors[:, :1] * (values[0] / 2).sqrt()
    return PPCA.from_parameters(loadings, columns.mean, (variance / 2).sqrt())
