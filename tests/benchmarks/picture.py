"""The benchmark's picture: milliseconds a step of every contender, one panel a shape."""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

OURS = ("fit_svi, captured", "CapturedSVI")


def draw(results, path):
    """Horizontal bars of the time of a step, on a logarithmic axis; the package's in colour."""
    shapes = results["steps"]
    names = list(dict.fromkeys(name for table in shapes.values() for name in table))
    columns = min(3, len(shapes))
    lines = -(-len(shapes) // columns)
    figure = Figure(figsize=(4.2 + 3.2 * columns, 1.2 + lines * (0.9 + 0.24 * len(names))))
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for panel, (title, table) in zip(panels.flat, shapes.items(), strict=False):
        for place, name in enumerate(names):
            if name in table:
                value = table[name]["milliseconds a step"]
                colour = "#c44e52" if name.startswith(OURS) else "#8c8c8c"
                panel.barh(place, value, color=colour)
                panel.text(value * 1.06, place, f"{value:.3g}", va="center", fontsize=7)
        panel.set_xscale("log")
        low, high = panel.get_xlim()
        panel.set_xlim(low, high * 2)
        panel.set_yticks(range(len(names)), names, fontsize=8)
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("milliseconds a step", fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].invert_yaxis()
    for panel in panels.flat[len(shapes) :]:
        panel.set_axis_off()
    figure.suptitle(f"Time of a training step ({results['about']})", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
