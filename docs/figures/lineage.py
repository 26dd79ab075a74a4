"""The picture at the top of the README: ELBO and log p of each stage on the digits.

Run ``ppl-vae lineage --out out`` first; then ``python docs/figures/lineage.py out``.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt

from ppl_vae.plots.lineage import gaps_size, plot_gaps
from ppl_vae.report.archive import read_results

lineage = read_results(Path(sys.argv[1]) / "results.json")[0]
figure, ax = plt.subplots(figsize=gaps_size(lineage), layout="constrained")
plot_gaps(lineage, ax)
figure.savefig(Path(__file__).parents[1] / "_static" / "lineage.png", dpi=110)
