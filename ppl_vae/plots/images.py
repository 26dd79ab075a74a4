"""Pictures of rows of data as the models see them: images, or profiles over the columns."""

from matplotlib.axes import Axes

from ppl_vae.data.image_grid import ImageGrid
from ppl_vae.plots.drawing import draw_tiles, new_axes, tile_size, title

PROFILES = "(lines: the columns in order, in their standard deviations)"
OF_ALL = "Held-out data, reconstructed"
OF_LADDER = (
    "The plane of a second VAE, for pictures only",
    "From datum to datum in that second VAE",
)
MISSING_LABELS = ("(tinted: missing)", "(gaps: missing)")


def reconstructions(
    image_grid: ImageGrid, ax: Axes | None = None, *, heading: str = OF_ALL
) -> Axes:
    """Held-out data over what each model makes of them."""
    rows = "row of the data (the first is 0)"
    return _tiled(image_grid, ax, heading, rows)


def denoised(image_grid: ImageGrid, ax: Axes | None = None) -> Axes:
    """Held-out data, clean and with noise on them, over what each denoiser makes of the latter."""
    rows = "row of the held-out data (the first is 0)"
    return _tiled(image_grid, ax, "Held-out data, denoised", rows, "denoiser")


def samples(image_grid: ImageGrid, ax: Axes | None = None) -> Axes:
    """Draws of x from each model, noise included."""
    return _tiled(image_grid, ax, "Drawn from the models", "draw")


def manifold(
    image_grid: ImageGrid, ax: Axes | None = None, *, heading: str = OF_LADDER[0]
) -> Axes:
    """The mean of x over the plane of two latents."""
    names = (f"$z_{k}$, standard deviations of the prior" for k in (1, 2))
    return _tiled(image_grid, ax, heading, *names)


def interpolation(
    image_grid: ImageGrid, ax: Axes | None = None, *, heading: str = OF_LADDER[1]
) -> Axes:
    """The mean of x on the way from the code of one datum to that of another."""
    way = "position between the two codes, 0 to 1"
    return _tiled(image_grid, ax, heading, way, "rows of the data")


def _tiled(
    image_grid: ImageGrid, ax: Axes | None, heading: str, across: str, down: str = "model"
) -> Axes:
    ax = new_axes(ax, tile_size(image_grid))
    draw_tiles(image_grid, ax)
    lines = "" if image_grid.image_shape else f"\n{PROFILES}"
    holes = f"\n{MISSING_LABELS[image_grid.image_shape is None]}" if image_grid.has_missing else ""
    ax.set_xlabel(across + lines + holes)
    ax.set_ylabel(down)
    title(ax, heading)
    return ax
