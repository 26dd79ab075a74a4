"""The benchmark's picture: milliseconds a step of every contender, one panel a shape."""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

OURS = ("fit_svi, compiled", "CapturedSVI")


def draw(results, path):
    """Points on a logarithmic axis, the fastest to the left; the package's in colour."""
    shapes = results["steps"]
    names = list(dict.fromkeys(name for table in shapes.values() for name in table))
    columns = min(3, len(shapes))
    lines = -(-len(shapes) // columns)
    size = (4.2 + 3.2 * columns, 1.2 + lines * (0.9 + 0.24 * len(names)))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for panel, (title, table) in zip(panels.flat, shapes.items(), strict=False):
        _panel(panel, title, table, names)
    for panel in panels.flat[len(shapes) :]:
        panel.set_axis_off()
    panels[0, 0].invert_yaxis()
    figure.suptitle(f"Time of a training step ({results['about']})", fontsize=10)
    figure.savefig(path, dpi=120)


def _panel(panel, title, table, names):
    for place, name in enumerate(names):
        if name in table:
            value = table[name]["milliseconds per step"]
            colour = "#c44e52" if name.startswith(OURS) else "#6c6c6c"
            panel.plot(value, place, "o", color=colour, markersize=6)
            panel.annotate(
                f"{value:.3g}",
                (value, place),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
            )
    panel.set_xscale("log")
    low, high = panel.get_xlim()
    panel.set_xlim(low, high * 1.6)
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    panel.grid(axis="both", color="#e6e6e6")
    panel.set_axisbelow(True)
    panel.tick_params(labelsize=8)
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.set_title(title, fontsize=9)
    panel.set_xlabel("milliseconds per step", fontsize=8)
    panel.spines[["top", "right"]].set_visible(False)
