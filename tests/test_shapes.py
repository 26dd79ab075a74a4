"""The checks of types and shapes that every other test relies on."""

import pytest
import torch
from jaxtyping import Float
from shapes import checked
from torch import Tensor

from ppl_vae.core.fit_result import FitResult
from ppl_vae.models import PPCA
from ppl_vae.networks import mlp
from ppl_vae.objectives import elbo


@checked
def product(x: Float[Tensor, "N D"], y: Float[Tensor, "D K"], size: int) -> Float[Tensor, "N K"]:
    return (x @ y)[:size]


def test_a_dimension_has_one_size_in_all_arguments_and_in_the_result():
    assert product(torch.ones(4, 3), torch.ones(3, 2), 4).shape == (4, 2)
    for arguments, parameter in (
        ((torch.ones(4, 3), torch.ones(2, 2), 4), "parameter y"),
        ((torch.ones(4, 3), torch.ones(3, 2), 3), "return"),
        ((torch.ones(4), torch.ones(3, 2), 4), "parameter x"),
        ((torch.ones(4, 3), torch.ones(3, 2), "4"), "parameter size"),
    ):
        with pytest.raises(TypeError, match=f"(?s){parameter}.* violates type hint"):
            product(*arguments)


def test_a_dimension_may_have_another_size_in_the_next_call():
    assert product(torch.ones(4, 3), torch.ones(3, 2), 4).shape == (4, 2)
    assert product(torch.ones(5, 1), torch.ones(1, 6), 5).shape == (5, 6)


def test_the_functions_and_the_fields_of_the_package_are_checked():
    with pytest.raises(TypeError, match="violates type hint"):
        mlp("6", 2)
    ppca = PPCA(6, 2, seed=0)
    with pytest.raises(TypeError, match="violates type hint"):
        elbo(ppca.model, ppca.model, torch.zeros(3, 6), num_samples="1")
    values, elapsed = torch.zeros(3), torch.arange(3.0)
    assert FitResult("SVI", values, elapsed, 3, 0.5, "after 3 steps").steps == 3
    with pytest.raises(TypeError, match="parameter steps"):
        FitResult("SVI", values, elapsed, "3", 0.5, "after 3 steps")
