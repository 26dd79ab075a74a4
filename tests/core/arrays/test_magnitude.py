"""Entries too large for sums of squares are refused by row and column, at every entry point."""

import numpy as np
import pandas as pd
import pytest

import ppl_vae
from ppl_vae import PPCA, VAE, BayesianPPCA
from ppl_vae.data.sources.row_blocks import RowBlocks
from ppl_vae.interop import PPCATransformer

PLAIN = np.random.default_rng(0).normal(size=(12, 3))


@pytest.fixture(scope="module")
def vae():
    return VAE.mlp(3, 1, hidden=(4,), seed=0).double()


ENTRY_POINTS = {
    "PPCA.like": lambda x, vae: PPCA.like(x, 1, seed=0),
    "fit_em": lambda x, vae: ppl_vae.fit_em(PPCA(3, 1, seed=0).double(), x),
    "fit_closed_form": lambda x, vae: ppl_vae.fit_closed_form(PPCA(3, 1, seed=0).double(), x),
    "BayesianPPCA.like": lambda x, vae: BayesianPPCA.like(x, 1),
    "fit_vb": lambda x, vae: ppl_vae.fit_vb(BayesianPPCA(3, 1).double(), x, seed=0),
    "VAE.like": lambda x, vae: VAE.like(x, 1, hidden=(4,), seed=0),
    "fit_svi": lambda x, vae: ppl_vae.fit_svi(vae.model, vae.guide, x, steps=1, seed=0),
    "log_likelihood": lambda x, vae: ppl_vae.log_likelihood(vae.model, vae.guide, x, 5, seed=0),
    "elbo": lambda x, vae: ppl_vae.elbo(vae.model, vae.guide, x, seed=0),
    "collapse": lambda x, vae: ppl_vae.collapse(vae.model, vae.guide, x, seed=0),
    "PPCATransformer": lambda x, vae: PPCATransformer(1).fit(x),
}


@pytest.mark.parametrize("value", [1e160, -1e300])
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_the_row_and_the_column_are_named(entry, missing, value, vae):
    x = PLAIN.copy()
    x[7, 2] = value
    if missing:
        x[1, 0] = np.nan
        if entry == "fit_closed_form":
            pytest.skip("it takes complete data only")
    with pytest.raises(ValueError, match=r"1 entry beyond 1e\+150 .*in row 7, column 2"):
        ENTRY_POINTS[entry](x, vae)


@pytest.mark.parametrize("entry", ["fit_svi", "log_likelihood"])
def test_columns_of_frames_are_named(entry, vae):
    x = pd.DataFrame(PLAIN, columns=["a", "b", "c"])
    x.loc[2, "b"] = 1e200
    with pytest.raises(ValueError, match="in row 2, column 'b'"):
        ENTRY_POINTS[entry](x, vae)


def test_blocks_are_named():
    blocks = [PLAIN, PLAIN.copy()]
    blocks[1][0, 1] = 1e170
    with pytest.raises(ValueError, match=r"block 1 of x has 1 entry .*row 0, column 1"):
        list(RowBlocks(iter(blocks)).read())


def test_tables_that_are_large_as_a_whole_are_fitted():
    own = ppl_vae.fit_em(PPCA.like(PLAIN, 1, seed=0), PLAIN)
    scaled = ppl_vae.fit_em(PPCA.like(PLAIN * 1e160, 1, seed=0), PLAIN * 1e160)
    expected = float(own.objective[-1]) - 3 * np.log(1e160)
    assert float(scaled.objective[-1]) == pytest.approx(expected, rel=1e-9)


def test_log_p_that_overflows_names_the_row():
    x = PLAIN.copy()
    x[5] = 1e300
    with pytest.raises(FloatingPointError, match=r"1 of 12 numbers overflow .*row 5"):
        PPCA(3, 1, seed=0).double().log_likelihood(x)
