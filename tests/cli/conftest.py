"""Fixtures of the tests of commands."""

import pytest


@pytest.fixture(scope="module")
def short_evaluations():
    """Evaluations and imputations of VAEs with few draws, and without refinement."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ppl_vae.fitted.held_out.REFINE", 0)
        patch.setattr("ppl_vae.fitted.held_out.DRAWS", 200)
        patch.setattr("ppl_vae.cli.imputing.REFINE", 0)
        yield
