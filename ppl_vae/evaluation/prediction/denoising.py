"""Denoisers compared on the same held-out rows with the same noise."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.results import Result
from ppl_vae.core.state import seeded
from ppl_vae.core.stats import mean_and_error
from ppl_vae.core.text import counted
from ppl_vae.core.text_table import render
from ppl_vae.core.validation import ArrayLike, as_matrix
from ppl_vae.data.image_grid import ImageGrid

if TYPE_CHECKING:
    import pandas


NO_DENOISING = "no denoising"


@dataclass(frozen=True, repr=False)
class Denoising(Result):
    """Squared errors of denoisers on each row.

    Attributes:
        names: ``"no denoising"``, for the noisy rows themselves, and the denoisers as given.
        error: |x - denoised x|^2 for each denoiser and row, in squared units of x.
        clean, noisy: the rows without and with noise, (N, D).
        denoised: the rows as denoised by each, the noisy rows first.
    """

    names: tuple[str, ...]
    error: Float[Tensor, "M N"]
    clean: Float[Tensor, "N D"]
    noisy: Float[Tensor, "N D"]
    denoised: Float[Tensor, "M N D"]

    def difference(self, name: str, other: str) -> tuple[float, float]:
        """The mean error of one denoiser minus that of another, and its paired standard error.

        Raises:
            KeyError: if there is no denoiser of that name.
        """
        for each in (name, other):
            if each not in self.names:
                raise KeyError(f"no denoiser is called {each!r}; the names are {self.names}")
        values = self.error[self.names.index(name)] - self.error[self.names.index(other)]
        return mean_and_error(values)

    @property
    def best(self) -> str:
        """The name of the denoiser with the smallest mean error."""
        return self.names[int(self.error.mean(1).argmin())]

    def image_grid(
        self, rows: Sequence[int], image_shape: tuple[int, int] | None = None
    ) -> ImageGrid:
        """Some rows, clean, noisy and denoised, for :func:`ppl_vae.plots.images.plot_denoised`.

        Args:
            rows: the indices of the rows.
            image_shape: height and width, if each row is an image.
        """
        images = torch.cat([self.clean[None], self.denoised])[:, list(rows)]
        labels = ("clean", "noisy", *self.names[1:])
        return ImageGrid.of(images, labels, [str(row) for row in rows], self.clean, image_shape)

    def to_frame(self) -> "pandas.DataFrame":
        """The errors, with one row per datum and one column per denoiser."""
        import pandas as pd

        return pd.DataFrame(
            self.error.T.numpy(force=True), columns=pd.Index(self.names, name="denoiser")
        )

    def __repr__(self) -> str:
        rows, columns = map(counted, self.clean.shape, ("row", "column"))
        head = (
            f"{rows} of {columns}; |x - denoised|^2 per row, in "
            "squared units of x, ± one standard error; paired differences to the smallest"
        )
        return "\n".join([head, render([self._cells(name) for name in self.names])])

    def _cells(self, name: str) -> tuple[str, ...]:
        error = self.error[self.names.index(name)]
        mean = "{:.3f} ± {:.3f}".format(*mean_and_error(error))
        if name == self.best:
            return name, mean, "<- smallest"
        return name, mean, "{:+.3f} ± {:.3f}".format(*self.difference(name, self.best))


@torch.no_grad()
def compare_denoisers(
    denoisers: Mapping[str, Callable[[Tensor], Tensor]],
    x: ArrayLike,
    noise: Callable[[Tensor], Tensor],
    *,
    seed: int | None = None,
) -> Denoising:
    """Denoise held-out rows to which noise was added, and compute the remaining errors.

    Args:
        denoisers: by name, functions from noisy rows to denoised ones, such as
            ``autoencoder.reconstruct`` or the posterior mean ``ppca.reconstruct``.
        x: clean rows to which no denoiser was fitted, (N, D).
        noise: a function from rows to noisy rows, such as
            :class:`~ppl_vae.networks.GaussianNoise`.
        seed: seed of the noise.

    Raises:
        ValueError: if there are no denoisers, if x has missing values or fewer than two rows, or
            if a denoiser returns another shape.
    """
    if not denoisers or NO_DENOISING in denoisers:
        raise ValueError(f"give at least one denoiser, none of them called {NO_DENOISING!r}")
    x = as_matrix(x)
    if len(x) < 2 or bool(x.isnan().any()):
        raise ValueError("x must be two or more complete rows, to which noise can be added")
    with seeded(seed):
        noisy = noise(x)
    results = {NO_DENOISING: noisy} | {name: f(noisy) for name, f in denoisers.items()}
    for name, rows in results.items():
        if rows.shape != x.shape:
            raise ValueError(
                f"{name!r} must return {tuple(x.shape)}; it returned {tuple(rows.shape)}"
            )
    denoised = torch.stack([rows.detach().double().cpu() for rows in results.values()])
    clean = x.double().cpu()
    error = (denoised - clean).square().sum(2)
    return Denoising(tuple(results), error, clean, noisy.double().cpu(), denoised)
