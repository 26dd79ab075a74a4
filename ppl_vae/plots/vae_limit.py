"""A plot of the limit in which a VAE becomes an autoencoder."""

from matplotlib.axes import Axes

from ppl_vae.evaluation.latent_space.vae_limit import VAELimit
from ppl_vae.plots.axes import BLUE, NATS, ORANGE, legend_below, log_scale, new_axes, title


def plot_vae_limit(limit: VAELimit, ax: Axes | None = None) -> Axes:
    """Plot a VAE's loss minus the autoencoder's, as the scale of q vanishes.

    The loss excludes the entropy of q, which depends on no parameter and diverges.

    Args:
        limit: a result of :func:`ppl_vae.evaluation.vae_limit`.
        ax: the axes to plot on.
    """
    ax = new_axes(ax)
    code = limit.autoencoder - limit.autoencoder_reconstruction
    parts = (
        ("-log p(x, z)", limit.difference, BLUE),
        ("-log p(z)", limit.cross_entropy - code, ORANGE),
    )
    for name, excess, part_colour in parts:
        ax.plot(
            limit.scales.cpu(),
            excess.abs().cpu(),
            "o-",
            ms=4,
            lw=1.2,
            color=part_colour,
            label=name,
        )
    log_scale(ax, "x")
    log_scale(ax, "y")
    ax.invert_xaxis()
    ax.set_xlabel("sigma_q, standard deviations of the prior")
    ax.set_ylabel(f"loss minus the autoencoder's, {NATS}")
    title(ax, "From the VAE to the autoencoder")
    legend_below(ax, 2)
    return ax
