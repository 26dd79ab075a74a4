"""Plots of rows of data and of model outputs: images, or cells of a table."""

from matplotlib.axes import Axes

from ppl_vae.data.image_grid import ImageGrid
from ppl_vae.plots.axes import (
    draw_image_grid,
    heatmap_notes,
    image_grid_size,
    new_axes,
    title,
)

MANIFOLD = "Latent plane of a second VAE, for figures only"
INTERPOLATION = "Interpolation in that second VAE"
MISSING_CELLS = "(tinted: missing)"


def plot_reconstructions(
    image_grid: ImageGrid, ax: Axes | None = None, *, heading: str = "Held-out reconstructions"
) -> Axes:
    """Plot held-out data above their reconstructions by each model.

    Args:
        image_grid: the data and the reconstructions, one row per model.
        ax: the axes to plot on.
        heading: the title.
    """
    return _plot_grid(image_grid, ax, heading, "row of the data (the first is 0)")


def plot_denoised(image_grid: ImageGrid, ax: Axes | None = None) -> Axes:
    """Plot held-out data, clean and noisy, above the output of each denoiser.

    Args:
        image_grid: the data and the outputs, one row per denoiser.
        ax: the axes to plot on.
    """
    rows = "row of the held-out data (the first is 0)"
    return _plot_grid(image_grid, ax, "Held-out data, denoised", rows, "denoiser")


def plot_samples(image_grid: ImageGrid, ax: Axes | None = None) -> Axes:
    """Plot draws of x, noise included, one row per model.

    Args:
        image_grid: the draws.
        ax: the axes to plot on.
    """
    return _plot_grid(image_grid, ax, "Samples", "draw")


def plot_manifold(
    image_grid: ImageGrid, ax: Axes | None = None, *, heading: str = MANIFOLD
) -> Axes:
    """Plot the mean of x over the plane of two latent dimensions.

    Args:
        image_grid: the means on a grid of the plane.
        ax: the axes to plot on.
        heading: the title.
    """
    first, second = (f"$z_{k}$, standard deviations of the prior" for k in (1, 2))
    return _plot_grid(image_grid, ax, heading, first, second)


def plot_interpolation(
    image_grid: ImageGrid, ax: Axes | None = None, *, heading: str = INTERPOLATION
) -> Axes:
    """Plot the mean of x along the line between the codes of two data.

    Args:
        image_grid: the means, one row per pair of data.
        ax, heading: as for :func:`plot_manifold`.
    """
    position = "position between the two codes, 0 to 1"
    return _plot_grid(image_grid, ax, heading, position, "rows of the data")


def _plot_grid(
    image_grid: ImageGrid, ax: Axes | None, heading: str, xlabel: str, ylabel: str = "model"
) -> Axes:
    ax = new_axes(ax, image_grid_size(image_grid))
    draw_image_grid(image_grid, ax)
    if image_grid.image_shape is None:
        notes = ["in each block, from left to right:", xlabel, *heatmap_notes(image_grid)]
        ylabel = "column"
    else:
        notes = [xlabel]
    notes += [MISSING_CELLS] if image_grid.has_missing else []
    ax.set_xlabel("\n".join(notes))
    ax.set_ylabel(ylabel)
    title(ax, heading)
    return ax
