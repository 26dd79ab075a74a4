"""Pictures of autoencoders, whose q is a point."""

from matplotlib.axes import Axes

from ppl_vae.evaluation.latent_space.vae_limit import VAELimit
from ppl_vae.plots.drawing import BLUE, NATS, ORANGE, legend_below, log_scale, new_axes, title


def vae_limit(seen: VAELimit, ax: Axes | None = None) -> Axes:
    """How far a VAE's loss is above the autoencoder's, as the width of its q vanishes.

    Less the entropy of q, in which no parameter stands; the loss with it grows without end.
    """
    ax = new_axes(ax)
    parts = (
        ("-log p(x, z)", seen.difference, BLUE),
        (
            "its part -log p(z)",
            seen.cross_entropy - (seen.autoencoder - seen.autoencoder_reconstruction),
            ORANGE,
        ),
    )
    for name, above, shade in parts:
        ax.plot(seen.scales, above.abs(), "o-", ms=4, lw=1.2, color=shade, label=name)
    log_scale(ax, "x")
    log_scale(ax, "y")
    ax.invert_xaxis()
    ax.set_xlabel("sigma_q, standard deviations of the prior")
    ax.set_ylabel(f"above the autoencoder's loss, {NATS}")
    title(ax, "A VAE whose q narrows to a point")
    legend_below(ax, 2)
    return ax
