"""Every kind of array and frame through every function that takes data: one answer."""

import decimal
import warnings

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse
import torch
import xarray as xr

import ppl_vae as pv
from ppl_vae.core import Imputation
from ppl_vae.core.validation import as_matrix, as_vector
from ppl_vae.data import binarize, split
from ppl_vae.data.sources.row_blocks import RowBlocks
from ppl_vae.evaluation import (
    collapse,
    compare_latent_dims,
    encode,
    predictive_check,
    reconstruct,
    select_by_masked_cv,
)
from ppl_vae.evaluation.latent_space.spectrum import expected_covariance
from ppl_vae.inference import fit_pca
from ppl_vae.interop import EncoderClassifier, FeatureTransformer, PPCATransformer

N, D = 24, 4
COLUMNS = ["a", "b", "c", "d"]
COMPLETE = np.random.default_rng(0).normal(size=(N, D)) @ np.diag([1.0, 2.0, 1.0, 0.5]) + 1
COMPLETE = np.round(COMPLETE, 3)
MISSING = np.where(np.random.default_rng(1).random((N, D)) < 0.15, np.nan, COMPLETE)
MISSING[:, 0] = COMPLETE[:, 0]


def optional(name):
    return pytest.importorskip(name, reason=f"{name} is not installed")


def nullable_columns(x):
    return {name: [None if v != v else v for v in x[:, k]] for k, name in enumerate(COLUMNS)}


def frame(x):
    return pd.DataFrame(x, columns=COLUMNS, index=[f"row {k}" for k in range(len(x))])


def infinite_under_a_mask(x):
    return np.ma.array(np.where(np.isnan(x), np.inf, x), mask=np.isnan(x))


def memory_map(x):
    path = tmp_folder / f"{np.isnan(x).any()}.dat"
    mapped = np.memmap(path, dtype=x.dtype, mode="w+", shape=x.shape)
    mapped[:] = x
    return mapped


def record_batch(x):
    return optional("pyarrow").table(nullable_columns(x)).to_batches()[0]


KINDS = {
    "array": lambda x: x,
    "column-major": np.asfortranarray,
    "other byte order": lambda x: x.astype(">f8"),
    "masked array": infinite_under_a_mask,
    "objects": lambda x: np.where(np.isnan(x), None, x),
    "decimals": lambda x: np.array(
        [[None if v != v else decimal.Decimal(str(v)) for v in row] for row in x], dtype=object
    ),
    "memory map": memory_map,
    "lists": lambda x: [[None if v != v else v for v in row] for row in x.tolist()],
    "tensor with a gradient": lambda x: torch.tensor(x, requires_grad=True),
    "rows": lambda x: [torch.tensor(row) for row in x],
    "blocks": lambda x: [x[:9], x[9:]],
    "blocks of frames": lambda x: [frame(x)[:9], frame(x)[9:][["c", "a", "d", "b"]]],
    "pandas": frame,
    "pandas, nullable": lambda x: frame(x).convert_dtypes(),
    "pandas, sparse": lambda x: frame(x).astype(pd.SparseDtype("float64", np.nan)),
    "pandas, Arrow": lambda x: frame(x).convert_dtypes(dtype_backend="pyarrow"),
    "pandas, objects": lambda x: frame(x).astype(object),
    "xarray": lambda x: xr.DataArray(x, dims=("row", "column"), coords={"column": COLUMNS}),
    "xarray, named": lambda x: xr.DataArray(x, dims=("y", "z"), name="v").assign_coords(
        z=COLUMNS, y=[f"row {k}" for k in range(N)]
    ),
    "xarray data set": lambda x: xr.Dataset(
        {name: ("row", x[:, k]) for k, name in enumerate(COLUMNS)}
    ),
    "polars": lambda x: optional("polars").DataFrame(nullable_columns(x)),
    "pyarrow": lambda x: optional("pyarrow").table(nullable_columns(x)),
    "pyarrow batch": record_batch,
}
FRAMES = ("pandas", "pandas, nullable", "xarray", "xarray data set", "polars", "pyarrow")


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    global tmp_folder
    tmp_folder = tmp_path_factory.mktemp("maps")


def ppca():
    return pv.PPCA.from_parameters(
        torch.tensor([[1.0], [2.0], [0.5], [0.1]]).double(), torch.ones(D).double(), 0.7
    )


def vae():
    return pv.VAE.mlp(D, 2, hidden=(3,), missing="zeros+mask", seed=0).double()


def bayesian():
    return pv.BayesianPPCA(D, 1).double()


def autoencoder():
    return pv.Autoencoder.linear(D, 2, seed=0).double()


def fitted(fit, model, x, *args, **keywords):
    fit(model, x, *args, **keywords)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def after_svi(x):
    model = vae()
    pv.fit_svi(model.model, model.guide, x, x_val=x, steps=2, seed=0, progress=False)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def imputed(found: Imputation):
    return torch.cat([found.mean, found.sd])


def of_pair(function, **keywords):
    def call(x):
        model = vae()
        return function(model.model, model.guide, x, **keywords)

    return call


def posterior_draws(x):
    found = pv.sample_posterior(
        bayesian(), x, num_samples=4, warmup=2, chains=1, seed=0, progress=False
    )
    return torch.cat([found.draws["loadings"].flatten(), found.log_predictive(x).value])


def arviz(x):
    model = vae()
    tree = pv.to_arviz(model.model, model.guide, x, num_samples=4, num_chains=1, seed=0)
    return torch.tensor(np.asarray(tree["observed_data"]["x"]))


LABELS = np.arange(N) % 2
ENTRY_POINTS = {
    "as_matrix": as_matrix,
    "RowBlocks": lambda x: torch.stack([block.totals for block in RowBlocks(x).read()]).sum(0),
    "PPCA.like": lambda x: pv.PPCA.like(x, 1, seed=0).loc,
    "VAE.like": lambda x: pv.VAE.like(x, 1, seed=0).guide.inputs.loc,
    "VAE.center": lambda x: fitted(lambda model, x: model.center(x), vae(), x),
    "BayesianPPCA.like": lambda x: pv.BayesianPPCA.like(x, 1).loc_prior().base_dist.loc,
    "fit_em": lambda x: fitted(pv.fit_em, ppca(), x, max_iterations=3),
    "variational_em": lambda x: fitted(pv.variational_em, ppca(), x, max_iterations=3),
    "fit_vb": lambda x: pv.fit_vb(bayesian(), x, max_iterations=3, seed=0).loc,
    "fit_svi": after_svi,
    "sample_posterior": posterior_draws,
    "posterior": lambda x: ppca().posterior(x).mean,
    "posterior_mean": lambda x: ppca().posterior_mean(x),
    "PPCA.log_likelihood": lambda x: ppca().log_likelihood(x),
    "PPCA.reconstruct": lambda x: ppca().reconstruct(x),
    "PPCA.impute": lambda x: imputed(ppca().impute(x)),
    "features": lambda x: vae().features(x),
    "VAE.reconstruct": lambda x: vae().reconstruct(x),
    "log_likelihood": of_pair(
        lambda *pair, **k: pv.log_likelihood(*pair, **k).value, num_samples=5, seed=0
    ),
    "elbo": of_pair(pv.elbo, num_samples=2, seed=0),
    "gaps": of_pair(
        lambda *p, **k: pv.gaps(*p, **k).elbo, steps=1, num_samples=4, tolerance=None, seed=0
    ),
    "collapse": of_pair(lambda *p: collapse(*p, seed=0).kl),
    "impute": of_pair(lambda *p, **k: imputed(pv.impute(*p, **k)), num_samples=5, seed=0),
    "encode": of_pair(encode),
    "reconstruct": of_pair(reconstruct),
    "expected_covariance": lambda x: expected_covariance(ppca(), x),
    "select_by_masked_cv": lambda x: (
        select_by_masked_cv(x, noises=["isotropic"], latent_dims=[1]).rmse
    ),
    "split": lambda x: split(x).train,
    "to_arviz": arviz,
    "PPCATransformer": lambda x: PPCATransformer(1, max_iter=10, tol=1e3).fit_transform(x),
    "PPCATransformer.impute": lambda x: PPCATransformer(1, tol=1e3).fit(x).impute(x),
    "score_samples": lambda x: PPCATransformer(1, tol=1e3).fit(x).score_samples(x),
    "FeatureTransformer": lambda x: FeatureTransformer(epochs=1).fit(x).transform(x),
    "EncoderClassifier": lambda x: EncoderClassifier(epochs=1).fit(x, LABELS).predict_proba(x),
}
COMPLETE_ONLY = {
    "fit_closed_form": lambda x: fitted(pv.fit_closed_form, ppca(), x),
    "fit_pca": lambda x: fitted(fit_pca, autoencoder(), x),
    "binarize": lambda x: binarize(x, torch.Generator().manual_seed(0)),
    "predictive_check": lambda x: (
        predictive_check(
            x, pv.fit_vb(bayesian(), x, seed=0).guide.draw_parameters(5, seed=0), seed=0
        ).observed
    ),
    "compare_latent_dims": lambda x: (
        compare_latent_dims(x, [1], num_samples=40, warmup=4, chains=1, seed=0).log_evidence
    ),
}
SLOW = {
    "EncoderClassifier",
    "FeatureTransformer",
    "PPCATransformer",
    "PPCATransformer.impute",
    "collapse",
    "compare_latent_dims",
    "elbo",
    "encode",
    "fit_em",
    "fit_svi",
    "fit_vb",
    "gaps",
    "impute",
    "log_likelihood",
    "predictive_check",
    "sample_posterior",
    "score_samples",
    "select_by_masked_cv",
    "to_arviz",
    "variational_em",
}
"""Functions that take longer, and are given a few kinds of data only in the fast tests."""
FEW = ["masked array", "xarray data set"]
SLOWEST = {"compare_latent_dims", "gaps", "predictive_check", "to_arviz"}
"""Functions that are left to the slow tests."""


def plain(found):
    """Results of any kind as a tensor."""
    if isinstance(found, torch.Tensor):
        return found.detach().double()
    if len(getattr(found, "shape", (0,))) == 2 or isinstance(found, xr.Dataset):
        return as_matrix(found, check_finite=False).double()
    return as_vector(found).double()


def check_one_answer(entry, call, x, kinds):
    expected = plain(call(torch.tensor(x)))
    assert expected.numel()
    for kind in kinds:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = plain(call(KINDS[kind](x)))
        torch.testing.assert_close(
            found, expected, equal_nan=True, rtol=1e-9, atol=1e-9, msg=f"{entry} of {kind}"
        )


@pytest.mark.parametrize("entry", sorted(ENTRY_POINTS.keys() - SLOWEST))
def test_every_kind_of_data_gives_one_answer(entry):
    kinds = [kind for kind in KINDS if available(kind)]
    kinds = FEW if entry in SLOW else kinds
    check_one_answer(entry, ENTRY_POINTS[entry], MISSING, kinds)


@pytest.mark.parametrize("entry", sorted(COMPLETE_ONLY.keys() - SLOWEST))
def test_every_kind_of_complete_data_gives_one_answer(entry):
    x = (COMPLETE - COMPLETE.min()) / 10 if entry == "binarize" else COMPLETE
    kinds = [kind for kind in KINDS if available(kind)]
    kinds = FEW[1:] if entry in SLOW else kinds
    check_one_answer(entry, COMPLETE_ONLY[entry], x, kinds)


UNDER_A_MASK = {
    "as_matrix": lambda x, mask: as_matrix(x, mask=mask),
    "RowBlocks": lambda x, mask: torch.stack(
        [block.totals for block in RowBlocks(x, mask).read()]
    ).sum(0),
    "PPCA.like": lambda x, mask: pv.PPCA.like(x, 1, mask=mask, seed=0).loc,
    "fit_em": lambda x, mask: fitted(pv.fit_em, ppca(), x, mask=mask, max_iterations=3),
    "fit_vb": lambda x, mask: pv.fit_vb(bayesian(), x, mask=mask, max_iterations=3, seed=0).loc,
    "log_likelihood": lambda x, mask: ppca().log_likelihood(x, mask=mask),
    "impute": lambda x, mask: imputed(ppca().impute(x, mask=mask)),
    "reconstruct": lambda x, mask: ppca().reconstruct(x, mask=mask),
    "features": lambda x, mask: vae().features(x, mask=mask),
    "elbo": lambda x, mask: of_pair(pv.elbo, mask=mask, seed=0)(x),
    "impute by a pair": lambda x, mask: of_pair(
        lambda *p, **k: imputed(pv.impute(*p, **k)), num_samples=5, mask=mask, seed=0
    )(x),
}


@pytest.mark.parametrize("entry", UNDER_A_MASK)
def test_values_under_a_mask_may_be_infinite(entry):
    x, mask = np.where(np.isnan(MISSING), np.inf, MISSING), ~np.isnan(MISSING)
    call = UNDER_A_MASK[entry]
    expected = plain(call(torch.tensor(MISSING), None))
    for given, hidden in (
        (x, mask),
        (torch.tensor(x), torch.tensor(mask)),
        (frame(x), frame(mask)[["d", "b", "a", "c"]]),
        (memory_map(x), mask.tolist()),
        ([x[:9], x[9:]], [mask[:9], mask[9:]]),
    ):
        found = plain(call(given, hidden))
        torch.testing.assert_close(found, expected, equal_nan=True)


SPARSE = {
    "scipy": scipy.sparse.csr_matrix,
    "scipy array": scipy.sparse.coo_array,
    "torch": lambda x: torch.tensor(x).to_sparse(),
}


@pytest.mark.parametrize("entry", sorted(ENTRY_POINTS.keys() - SLOW))
def test_sparse_matrices_give_the_answer_of_dense_ones(entry):
    x = np.where(np.abs(COMPLETE) < 0.7, 0.0, COMPLETE)
    expected = plain(ENTRY_POINTS[entry](torch.tensor(x)))
    for kind, sparse in SPARSE.items():
        with pytest.warns(UserWarning, match="is a sparse matrix; it is converted to a dense one"):
            found = plain(ENTRY_POINTS[entry](sparse(x)))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, msg=f"{entry}: {kind}")


def structured_array(x):
    return frame(x).to_records(index=False).view(np.ndarray)


NO_TABLES = {
    "structured array": (structured_array, "a structured array with the fields 'a', 'b'"),
    "record array": (lambda x: frame(x).to_records(index=False), "the fields 'a', 'b', 'c', 'd'"),
    "masked fields": (lambda x: np.ma.array(structured_array(x)), "the fields 'a', 'b'"),
    "dictionary": (lambda x: dict(zip(COLUMNS, x.T, strict=True)), "the keys 'a', 'b', 'c', 'd'"),
    "dictionaries": (lambda x: frame(x).to_dict("records"), "a list of dictionaries"),
    "complex": (lambda x: x + 1j, "[Cc]omplex"),
    "durations": (lambda x: np.nan_to_num(x).astype("m8[s]"), "must hold numbers"),
    "texts": (lambda x: x.astype(str), "must hold numbers"),
    "dates": (lambda x: frame(x).assign(a=pd.Timestamp("2020")), r"not numeric: \['a'\]"),
    "categories": (lambda x: frame(x).assign(b=pd.Categorical(["u"] * N)), r"numeric: \['b'\]"),
}


@pytest.mark.parametrize("entry", sorted(ENTRY_POINTS.keys() | COMPLETE_ONLY.keys()))
def test_what_is_no_table_of_numbers_is_refused_by_name(entry):
    call = (ENTRY_POINTS | COMPLETE_ONLY)[entry]
    for make, message in NO_TABLES.values():
        with pytest.raises(
            (TypeError, ValueError), match=message
        ):  # scikit-learn raises the latter
            call(make(COMPLETE))


def available(kind):
    library = kind.partition(" ")[0]
    if library not in ("polars", "pyarrow"):
        return True
    try:
        __import__(library)
    except ModuleNotFoundError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("entry", sorted(SLOW))
def test_every_kind_of_data_gives_one_answer_also_where_it_takes_long(entry):
    calls, x = (ENTRY_POINTS, MISSING) if entry in ENTRY_POINTS else (COMPLETE_ONLY, COMPLETE)
    check_one_answer(entry, calls[entry], x, [kind for kind in KINDS if available(kind)])


def test_tensors_and_frames_that_are_no_tables_are_refused_by_name():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        nested = torch.nested.nested_tensor([torch.randn(3), torch.randn(3)])
    repeated = pa.Table.from_arrays([pa.array([1.0, 2.0])] * 2, names=["a", "a"])
    for x, error, message in (
        (nested, TypeError, "x must be .*; it is a nested tensor"),
        (torch.empty(4, 3, device="meta"), TypeError, "x must be .*device 'meta'"),
        (repeated, ValueError, "x has several columns of one name; rename them: .*'a' 2 times"),
    ):
        with pytest.raises(error, match=message):
            pv.PPCA.like(x, 1)
        with pytest.raises(error, match=message):
            pv.PPCA(3, 1, seed=0).log_likelihood(x)
