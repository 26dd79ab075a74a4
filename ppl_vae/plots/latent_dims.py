"""Plot of the posterior probabilities of numbers of latent dimensions."""

import numpy as np
from matplotlib.axes import Axes

from ppl_vae.evaluation.evidence.latent_dims_result import LatentDims
from ppl_vae.plots.axes import BLUE, GREY, colour, legend_below, new_axes, title

LABELS = {
    "vb_bound": "bound of variational Bayes",
    "laplace": "Laplace",
    "minka": "Minka",
    "bic": "BIC",
}


def plot_latent_dims(result: LatentDims, ax: Axes | None = None) -> Axes:
    """Plot p(K | x), with the probabilities that approximations of the evidence would give.

    Bars are p(K | x) from bridge sampling, with one standard error; lines are the probabilities
    with each approximation in place of log p(x | K), where it has a value for all K. The dashed
    line is the K with the largest held-out log p.

    Args:
        result: the result of :func:`ppl_vae.evaluation.compare_latent_dims`.
        ax: the axes to plot on.
    """
    ax = new_axes(ax)
    at = np.arange(len(result.dims))
    ax.bar(
        at,
        result.probability.numpy(force=True),
        yerr=result.probability_error.numpy(force=True),
        color=BLUE,
        alpha=0.5,
        label="p(K | x), bridge sampling",
        error_kw={"lw": 1, "capsize": 3},
    )
    for index, (name, label) in enumerate(LABELS.items()):
        values = result.approximations[name]
        if bool(values.isnan().any()):
            continue
        shade = colour(index + 1)
        ax.plot(
            at, values.softmax(0).numpy(force=True), "o-", ms=4, lw=1, color=shade, label=label
        )
    if (held_out := result.chosen_by("held_out")) is not None:
        index = result.dims.index(held_out)
        ax.axvline(index, ls="--", lw=1, color=GREY, label="largest held-out log p")
    ax.set_xticks(at, [str(k) for k in result.dims])
    ax.set_ylim(0, 1.05)
    ax.set_xlabel("number of latent dimensions K")
    ax.set_ylabel("probability (no unit)")
    title(ax, "Number of latent dimensions given the data")
    legend_below(ax, 2)
    return ax
