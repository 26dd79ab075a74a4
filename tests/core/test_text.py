"""Numbers with their nouns, and texts of results that use them."""

import pytest
import torch

from ppl_vae import PPCA, VAE, BayesianPPCA, Gaussian, fit_em, fit_svi
from ppl_vae.core.fit_result import FitResult
from ppl_vae.core.text import counted, short_number


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (1, "datum", "1 datum"),
        (0, "axis", "0 axes"),
        (2, "held-out row", "2 held-out rows"),
        (3, "missing entry", "3 missing entries"),
        (2, "axis", "2 axes"),
    ],
)
def test_nouns_agree_with_their_numbers(number, noun, text):
    assert counted(number, noun) == text


def test_large_numbers_are_rounded_to_three_digits():
    found = [short_number(value) for value in (-1.23456, 999.9, -1234567.0, 1.5e300)]
    assert found == ["-1.235", "999.900", "-1.23e+06", "1.5e+300"]


@pytest.mark.parametrize(("steps", "remark"), [(1, ""), (60, ", the mean over the last 50 steps")])
def test_the_printed_objective_of_svi_states_what_it_is(steps, remark):
    objective = torch.arange(steps).double()
    result = FitResult("SVI", objective, objective, steps, 0.0, "all requested")
    first, second = repr(result).splitlines()
    assert first == f"SVI: {counted(steps, 'step')} in 0.00 s, all requested"
    assert second == f"  objective {objective[-50:].mean():.4f} nats per datum{remark}"


@pytest.mark.parametrize("fit", [lambda p, x: fit_em(p, x), lambda p, x: p.log_likelihood(x)])
def test_a_file_name_is_no_data(fit, tmp_path):
    for name in ("mine.csv", tmp_path / "mine.csv"):
        with pytest.raises(TypeError, match=r"x is a file name.*read_table\('.*mine.csv'\)"):
            fit(PPCA(2, 1), name)
    vae = VAE.mlp(2, 1)
    with pytest.raises(TypeError, match="x is a file name"):
        fit_svi(vae.model, vae.guide, "mine.csv", steps=1)


def test_models_are_tables_of_their_parameters_in_notebooks():
    text = PPCA.from_parameters(torch.ones(5, 2), torch.zeros(5), 0.7)._repr_html_()
    assert text.startswith(
        "<pre>PPCA(data_dim=5, latent_dim=2, noise=&quot;isotropic&quot;)</pre>"
    )
    cells = [line for line in text.splitlines() if "<td" in line]
    assert len(cells) == 3 and "loadings" in cells[0] and "5 × 2" in cells[0]
    assert "noise_scale</td>" in cells[2] and "0.7" in cells[2]
    vae = VAE.mlp(6, 2, likelihood=Gaussian("shared", initial=0.25))
    scale = next(line for line in vae._repr_html_().splitlines() if "likelihood.scale<" in line)
    assert "0.25" in scale
    bayesian = BayesianPPCA(5, 2)._repr_html_()
    assert bayesian.startswith("<pre>BayesianPPCA(data_dim=5, latent_dim=2")
    assert "loadings ~ Normal(loc=0, scale=1)" in bayesian


def test_a_number_can_be_assigned_to_the_noise_scale():
    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    ppca = PPCA(4, 2, seed=0)
    parameter, before = ppca.noise_scale_unconstrained, ppca.log_likelihood(x)
    ppca.noise_scale = 0.8
    assert ppca.noise_scale_unconstrained is parameter
    expected = PPCA.from_parameters(ppca.loadings, ppca.loc, 0.8).log_likelihood(x)
    torch.testing.assert_close(ppca.log_likelihood(x), expected)
    assert not torch.allclose(before, expected)
    for wrong, message in ((-1.0, "must be positive"), (torch.ones(3), "must have shape")):
        with pytest.raises(ValueError, match=message):
            ppca.noise_scale = wrong
    torch.testing.assert_close(ppca.log_likelihood(x), expected)
