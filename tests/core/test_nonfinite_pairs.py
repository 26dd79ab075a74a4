"""An encoder that gives NaN for one row: the error names the site and the row, in every function
and whether or not Pyro validates arguments."""

import pytest
import torch

from ppl_vae import VAE, AmortizedGuide, gaps, impute, log_likelihood
from ppl_vae.core.state import validation

X = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
INCOMPLETE = torch.where(torch.arange(4) == 3, torch.nan, X)


class Encoder(torch.nn.Module):
    """A linear encoder whose outputs from ``first`` on are NaN for row 7."""

    def __init__(self, first):
        super().__init__()
        self.linear, self.first = torch.nn.Linear(4, 4), first

    def forward(self, x):
        wrong = (x[:, 0] == X[7, 0])[:, None] & (torch.arange(4) >= self.first)
        return torch.where(wrong, torch.nan, self.linear(x))


FUNCTIONS = {
    "log_likelihood": lambda *pair: log_likelihood(*pair, X, 20, seed=0),
    "refined": lambda *pair: log_likelihood(*pair, X, 20, refine=3, seed=0),
    "gaps": lambda *pair: gaps(*pair, X, num_samples=10, steps=3, seed=0),
    "impute": lambda *pair: impute(*pair, INCOMPLETE, 10, seed=0),
}


@pytest.mark.parametrize("validates", [True, False])
@pytest.mark.parametrize("first", [0, 2])  # of the mean and the scale; of the scale alone
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_site_and_the_row_are_named(name, first, validates):
    vae = VAE.like(X, 2, hidden=(4,), seed=0)
    guide = AmortizedGuide(Encoder(first), 2)
    what = "loc" if first == 0 else "scale"
    message = f"site 'z' of the guide has a parameter '{what}' that is NaN in row 7;"
    with validation(validates), pytest.raises((ValueError, FloatingPointError), match=message):
        FUNCTIONS[name](vae.model, guide)


def test_other_errors_stay_as_they_are():
    vae = VAE.like(X, 2, hidden=(4,), seed=0)

    class Failing(torch.nn.Module):
        def forward(self, x):
            raise RuntimeError("no weights")

    guide = AmortizedGuide(Failing(), 2)
    with pytest.raises(RuntimeError, match=r"^no weights"):
        log_likelihood(vae.model, guide, X, 20, seed=0)
