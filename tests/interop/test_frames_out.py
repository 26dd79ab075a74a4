"""What comes in as a frame comes out as one; models know the columns they were fitted to."""

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

import ppl_vae as pv
from ppl_vae.core.arrays.schema import TableSchema
from ppl_vae.core.validation import as_matrix, as_vector
from ppl_vae.evaluation import encode, gaps, reconstruct
from ppl_vae.inference import fit_pca
from ppl_vae.interop import PPCATransformer
from ppl_vae.likelihoods import Categorical
from ppl_vae.models import SupervisedEncoder

N, D = 20, 4
COLUMNS = ["a", "b", "c", "d"]
OTHER_ORDER = ["c", "a", "d", "b"]
X = np.random.default_rng(0).normal(size=(N, D)) * [1.0, 2.0, 3.0, 4.0] + [0, 5, 10, 15]
HIDDEN = np.where(np.random.default_rng(1).random((N, D)) < 0.1, np.nan, X)
INDEX = pd.Index([f"row {k}" for k in range(N)], name="name")
FRAME = pd.DataFrame(HIDDEN, columns=COLUMNS, index=INDEX)
COMPLETE = pd.DataFrame(X, columns=COLUMNS, index=INDEX)


def frames():
    yield "pandas", FRAME
    yield (
        "xarray",
        xr.DataArray(HIDDEN, dims=("name", "v"), coords={"name": list(INDEX), "v": COLUMNS}),
    )
    yield "data set", xr.Dataset({c: ("name", FRAME[c].to_numpy()) for c in COLUMNS})
    columns = {c: [None if v != v else v for v in FRAME[c]] for c in COLUMNS}
    for library, make in (("polars", "DataFrame"), ("pyarrow", "table")):
        try:
            module = __import__(library)
        except ModuleNotFoundError:
            continue
        yield library, getattr(module, make)(columns)


def fitted_ppca(x=FRAME):
    ppca = pv.PPCA(D, 1, seed=0).double()
    pv.fit_em(ppca, x, max_iterations=20, tol=1e-3)
    return ppca


def fitted_vae(x=FRAME):
    vae = pv.VAE.mlp(D, 2, hidden=(3,), missing="zeros+mask", seed=0).double()
    pv.fit_svi(vae.model, vae.guide, x, steps=3, seed=0, progress=False)
    return vae


def same(found, expected):
    expected = as_matrix(expected) if expected.ndim == 2 else torch.as_tensor(expected)
    found = as_matrix(found) if expected.ndim == 2 else as_vector(found)
    torch.testing.assert_close(found.double(), expected.detach().double(), equal_nan=True)


@pytest.mark.parametrize(("library", "x"), list(frames()), ids=[name for name, _ in frames()])
def test_results_are_frames_of_the_library_of_the_data(library, x):
    ppca, vae = fitted_ppca(x), fitted_vae(x)
    assert ppca.schema.names == vae.schema.names == tuple(COLUMNS)
    pair = vae.model, vae.guide
    tables = {
        "impute": (ppca.impute(x).to_frame(), ppca.impute(HIDDEN).mean),
        "sd": (ppca.impute(x).to_frame("sd"), ppca.impute(HIDDEN).sd),
        "pair": (
            pv.impute(*pair, x, 5, seed=0).to_frame(),
            pv.impute(*pair, HIDDEN, 5, seed=0).mean,
        ),
        "posterior_mean": (ppca.posterior_mean(x), ppca.posterior_mean(HIDDEN)),
        "reconstruct": (ppca.reconstruct(x), ppca.reconstruct(HIDDEN)),
        "features": (vae.features(x), vae.features(HIDDEN)),
        "VAE": (vae.reconstruct(x), vae.reconstruct(HIDDEN)),
        "encode": (encode(*pair, x), encode(*pair, HIDDEN)),
        "means": (reconstruct(*pair, x), reconstruct(*pair, HIDDEN)),
        "sample": (ppca.sample(3, seed=0), fitted_ppca(HIDDEN).sample(3, seed=0)),
        "sample of a VAE": (vae.sample(3, seed=0), fitted_vae(HIDDEN).sample(3, seed=0)),
    }
    for name, (found, expected) in tables.items():
        assert type(found) is type(x), name
        assert isinstance(expected, torch.Tensor), name
        same(found, expected)
    rows = {
        "exact": (ppca.log_likelihood(x), ppca.log_likelihood(HIDDEN)),
        "elbo": (pv.elbo(*pair, x, seed=0), pv.elbo(*pair, HIDDEN, seed=0)),
    }
    for found, expected in rows.values():
        assert type(found).__module__.split(".")[0] == type(x).__module__.split(".")[0]
        same(found, expected)
    estimate = pv.log_likelihood(*pair, x, 5, seed=0)
    assert type(estimate.to_frame()) is (xr.Dataset if library == "xarray" else type(x))
    same(estimate.to_frame()["value"], estimate.value)


def test_a_pandas_frame_keeps_its_index_and_columns():
    ppca, vae = fitted_ppca(), fitted_vae()
    filled = ppca.impute(FRAME).to_frame()
    assert filled.index.equals(INDEX) and list(filled.columns) == COLUMNS
    pd.testing.assert_frame_equal(filled.where(FRAME.notna()), FRAME)
    assert list(ppca.posterior_mean(FRAME).columns) == ["z1"]
    assert list(vae.features(FRAME).columns) == ["z1", "z2"]
    assert vae.features(FRAME).index.equals(INDEX)
    assert list(ppca.sample(2).columns) == COLUMNS
    assert ppca.log_likelihood(FRAME).index.equals(INDEX)
    rows = torch.tensor([3, 1])
    part = pv.log_likelihood(vae.model, vae.guide, FRAME, 5, rows=rows, seed=0)
    assert list(part.to_frame().index) == ["row 3", "row 1"]
    assert list(part.first(1).to_frame().index) == ["row 3"]
    split = gaps(vae.model, vae.guide, FRAME, steps=1, num_samples=4, tolerance=None, seed=0)
    assert split.to_frame().index.equals(INDEX)
    assert list(pv.impute(vae.model, vae.guide, FRAME, 5).to_frame().columns) == COLUMNS
    assert PPCATransformer(1).fit(FRAME).impute(FRAME).index.equals(INDEX)
    with pytest.raises(ValueError, match="part must be one of 'mean', 'sd'"):
        ppca.impute(FRAME).to_frame("draws")


def test_estimators_return_frames_as_scikit_learn_does():
    transformer = PPCATransformer(1).set_output(transform="pandas").fit(FRAME)
    codes = transformer.transform(FRAME)
    assert codes.index.equals(INDEX) and list(codes.columns) == ["ppcatransformer0"]
    assert isinstance(PPCATransformer(1).fit_transform(FRAME), np.ndarray)
    with pytest.raises(ValueError, match="feature names should match"):
        transformer.transform(FRAME[OTHER_ORDER])


def test_the_imputation_of_an_array_is_a_frame_too():
    found = fitted_ppca(HIDDEN).impute(HIDDEN).to_frame()
    assert found.shape == (N, D) and not found.isna().any(axis=None)


FITS = {
    "fit_em": fitted_ppca,
    "fit_svi": fitted_vae,
    "PPCA.like": lambda x: pv.PPCA.like(x, 1, seed=0),
    "VAE.like": lambda x: pv.VAE.like(x, 1, seed=0),
    "center": lambda x: pv.VAE.mlp(D, 1, seed=0).double().center(x),
    "variational_em": lambda x: after(pv.variational_em, pv.PPCA(D, 1, seed=0).double(), x),
    "fit_closed_form": lambda x: after(pv.fit_closed_form, pv.PPCA(D, 1).double(), COMPLETE),
    "fit_vb": lambda x: after(pv.fit_vb, pv.BayesianPPCA(D, 1).double(), x),
    "sample_posterior": lambda x: (
        pv.sample_posterior(
            pv.BayesianPPCA(D, 1), x, num_samples=4, warmup=1, chains=1, progress=False
        ).model
    ),
    "fit_pca": lambda x: after(fit_pca, pv.Autoencoder.linear(D, 1, seed=0).double(), COMPLETE),
    "canonical": lambda x: fitted_ppca(x).canonical(),
}


def after(fit, model, x):
    fit(model, x)
    return model


@pytest.mark.parametrize("fit", FITS)
def test_a_model_fitted_to_a_frame_has_its_columns(fit, tmp_path):
    model = FITS[fit](FRAME)
    assert model.schema == TableSchema(tuple(COLUMNS), "pandas")
    if fit != "sample_posterior":  # priors given as distributions are rebuilt as well
        assert pv.load(pv.save(model, tmp_path)).schema == model.schema


def test_columns_of_a_later_frame_are_matched_by_name():
    ppca, vae = fitted_ppca(), fitted_vae()
    permuted, pair = FRAME[OTHER_ORDER], (vae.model, vae.guide)
    exact = ppca.log_likelihood(FRAME)
    pd.testing.assert_series_equal(ppca.log_likelihood(permuted), exact)
    assert not np.allclose(ppca.log_likelihood(permuted.to_numpy()).detach(), exact)
    pd.testing.assert_frame_equal(ppca.impute(permuted).to_frame(), ppca.impute(FRAME).to_frame())
    pd.testing.assert_frame_equal(ppca.reconstruct(permuted), ppca.reconstruct(FRAME))
    pd.testing.assert_frame_equal(vae.features(permuted), vae.features(FRAME))
    for function in (pv.log_likelihood, pv.elbo, pv.impute):
        found, expected = (
            as_numbers(function(*pair, x, num_samples=4, seed=0)) for x in (permuted, FRAME)
        )
        torch.testing.assert_close(found, expected)
    other = pv.PPCA(D, 1, seed=0).double()
    other.schema = ppca.schema
    pv.fit_em(other, permuted, max_iterations=20, tol=1e-3)
    torch.testing.assert_close(other.loadings, ppca.loadings)
    samples = pv.sample_posterior(
        pv.BayesianPPCA(D, 1), FRAME, num_samples=4, warmup=1, chains=1, progress=False
    )
    same(samples.log_predictive(permuted).value, samples.log_predictive(FRAME).value)


def as_numbers(found):
    for name in ("value", "mean"):
        if isinstance(getattr(found, name, None), torch.Tensor):
            return getattr(found, name)
    return as_vector(found)


def test_missing_columns_are_named_and_others_left_out():
    ppca = fitted_ppca()
    with pytest.raises(ValueError, match=r"x lacks 1 of the 4 columns that the model.*: 'b'"):
        ppca.log_likelihood(FRAME.drop(columns="b"))
    with pytest.warns(UserWarning, match=r"x has columns that the model was not.*'species'"):
        found = ppca.log_likelihood(FRAME.assign(species="setosa"))
    pd.testing.assert_series_equal(found, ppca.log_likelihood(FRAME))
    with pytest.raises(ValueError, match=r"x lacks 1 of the 4 columns"):
        pv.fit_em(ppca, FRAME.rename(columns={"a": "e"}))


def test_guides_know_the_columns_of_their_models():
    vae, permuted = fitted_vae(COMPLETE), COMPLETE[OTHER_ORDER]
    assert vae.guide.schema == vae.schema
    expected = vae.guide.distribution(COMPLETE).mean
    torch.testing.assert_close(vae.guide.distribution(permuted).mean, expected)
    assert vae.guide(permuted).shape == (N, 2)
    guide = pv.fit_vb(pv.BayesianPPCA(D, 1).double(), COMPLETE, seed=0).guide
    expected = guide.distribution(COMPLETE).mean
    torch.testing.assert_close(guide.distribution(permuted).mean, expected)


def test_columns_of_blocks_are_learned():
    blocks = [COMPLETE[:9], COMPLETE[9:][OTHER_ORDER]]
    for source in (blocks, iter(blocks)):
        ppca = pv.PPCA(D, 1, seed=0).double()
        pv.fit_closed_form(ppca, source)
        assert ppca.schema.names == tuple(COLUMNS)
        same(ppca.loc.detach(), torch.tensor(X.mean(0)))


def test_validation_rows_are_matched_to_the_training_rows():
    found = []
    for order in (COLUMNS, OTHER_ORDER):
        vae = pv.VAE.mlp(D, 2, hidden=(3,), seed=0).double()
        fit = pv.fit_svi(
            vae.model, vae.guide, COMPLETE, x_val=COMPLETE[order], steps=2, seed=0, progress=False
        )
        found.append(fit.validation)
    torch.testing.assert_close(*found)


def test_a_supervised_encoder_has_the_columns_of_its_frame():
    network = SupervisedEncoder(fitted_vae(HIDDEN), Categorical(2), seed=0)
    rows = network.rows(FRAME, np.arange(N) % 2)
    pv.fit_svi(network.model, network.guide, rows, steps=1, seed=0, progress=False)
    expected = network.predict(FRAME).base_dist.probs
    torch.testing.assert_close(network.predict(FRAME[OTHER_ORDER]).base_dist.probs, expected)
