"""Fixtures of the tests of commands."""

import pytest

from commands import SMALL_VAE, frame, run


@pytest.fixture(scope="module")
def short_evaluations():
    """Evaluations and imputations of VAEs with few draws, and without refinement."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ppl_vae.fitted.held_out.REFINE", 0)
        patch.setattr("ppl_vae.fitted.held_out.NUM_SAMPLES", 200)
        patch.setattr("ppl_vae.cli.imputing.REFINE", 0)
        yield


@pytest.fixture(scope="module")
def folder(short_evaluations, tmp_path_factory):
    """A folder with a table and fitted models."""
    place = tmp_path_factory.mktemp("models")
    frame().to_csv(place / "mine.csv", index=False)
    run("fit", place / "mine.csv", "--out", place / "ppca", "--latent-dim", 2)
    run("fit", place / "mine.csv", "--out", place / "vae", *SMALL_VAE)
    return place
