"""The normal equations of the M-step, which may be singular."""

import torch
from jaxtyping import Float
from torch import Tensor


def solve_normal_equations(
    gram: Float[Tensor, "D L L"], cross: Float[Tensor, "D L"]
) -> Float[Tensor, "D L"]:
    """The solutions of normal equations, of the least norm where there are several.

    There are several where a column is observed in few rows, whose z are known without error.
    """
    try:
        return torch.linalg.solve(gram, cross)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        return (torch.linalg.pinv(gram, hermitian=True) @ cross[..., None])[..., 0]
