"""Denoisers side by side: the same held-out rows with the same noise on them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.results import Result
from ppl_vae.core.state import seeded
from ppl_vae.core.text_table import render
from ppl_vae.core.validation import ArrayLike, as_matrix
from ppl_vae.data.image_grid import ImageGrid

NOISY = "as they are"


@dataclass(frozen=True, repr=False)
class Denoising(Result):
    """Squared errors of denoisers, row by row.

    Attributes:
        names: ``"as they are"``, the noisy rows themselves, and the denoisers in their order.
        error: |x - its denoised version|^2, a denoiser and a row, in squared units of x.
        clean, noisy: the rows, (N, D).
        denoised: by each, the noisy rows first.
    """

    names: tuple[str, ...]
    error: Float[Tensor, "M N"]
    clean: Float[Tensor, "N D"]
    noisy: Float[Tensor, "N D"]
    denoised: Float[Tensor, "M N D"]

    @property
    def best(self) -> str:
        """With the smallest mean error."""
        return self.names[int(self.error.mean(1).argmin())]

    def difference(self, name: str, other: str) -> tuple[float, float]:
        """The mean error of one less that of another, and its paired standard error.

        Raises:
            KeyError: if there is no denoiser of that name.
        """
        for wanted in (name, other):
            if wanted not in self.names:
                raise KeyError(f"no denoiser is called {wanted!r}; there are {self.names}")
        values = self.error[self.names.index(name)] - self.error[self.names.index(other)]
        return float(values.mean()), float(values.std()) / math.sqrt(len(values))

    def image_grid(
        self, rows: Sequence[int], image_shape: tuple[int, int] | None = None
    ) -> ImageGrid:
        """Some rows, clean, noisy and denoised, for :func:`ppl_vae.plots.images.plot_denoised`.

        Args:
            rows: which, counted from 0.
            image_shape: height and width, if a row is an image.
        """
        shown = torch.cat([self.clean[None], self.denoised])[:, list(rows)]
        down = ("clean", "noisy", *self.names[1:])
        return ImageGrid.of(shown, down, [str(row) for row in rows], self.clean, image_shape)

    def to_frame(self) -> pd.DataFrame:
        """The errors, one row a datum and one column a denoiser."""
        return pd.DataFrame(self.error.T.numpy(), columns=pd.Index(self.names, name="denoiser"))

    def __repr__(self) -> str:
        number, width = self.clean.shape
        head = (
            f"{number} rows of {width} columns; |x - denoised|^2 a row, in squared units of x, ± "
            "standard error; differences to the least are paired"
        )
        return "\n".join([head, render([self._cells(name) for name in self.names])])

    def _cells(self, name: str) -> tuple[str, ...]:
        error = self.error[self.names.index(name)]
        mean = f"{error.mean():.3f} ± {error.std() / math.sqrt(len(error)):.3f}"
        if name == self.best:
            return name, mean, "<- least"
        return name, mean, "{:+.3f} ± {:.3f}".format(*self.difference(name, self.best))


@torch.no_grad()
def compare_denoisers(
    denoisers: Mapping[str, Callable[[Tensor], Tensor]],
    x: ArrayLike,
    noise: Callable[[Tensor], Tensor],
    *,
    seed: int | None = None,
) -> Denoising:
    """Take noise off held-out rows, and measure what is left of it.

    Args:
        denoisers: by name, each from noisy rows to clean ones: ``autoencoder.reconstruct``, the
            posterior mean ``ppca.reconstruct``.
        x: clean rows that none of them was fitted to, (N, D).
        noise: from rows to noisy ones, e.g. :class:`~ppl_vae.GaussianNoise`.
        seed: of the noise.

    Raises:
        ValueError: if there are no denoisers, x has missing values or fewer than two rows, or one
            returns another shape.
    """
    if not denoisers or NOISY in denoisers:
        raise ValueError(f"give at least one denoiser, and call none of them {NOISY!r}")
    x = as_matrix(x)
    if len(x) < 2 or bool(x.isnan().any()):
        raise ValueError("x must be two or more complete rows: their noise is to be measured")
    with seeded(seed):
        noisy = noise(x)
    found = {NOISY: noisy} | {name: denoise(noisy) for name, denoise in denoisers.items()}
    for name, rows in found.items():
        if rows.shape != x.shape:
            raise ValueError(f"{name!r} must return {tuple(x.shape)}; it gave {tuple(rows.shape)}")
    denoised = torch.stack([rows.detach().double().cpu() for rows in found.values()])
    clean = x.double().cpu()
    error = (denoised - clean).square().sum(2)
    return Denoising(tuple(found), error, clean, noisy.double().cpu(), denoised)
