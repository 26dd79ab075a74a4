"""Messages of fits by several processes, as the package counts them: their numbers and sizes.

Run it as ``python tests/benchmarks/scaling.py``. Two processes fit a few rows; sizes depend on the
numbers of columns and latent dimensions only. What each of 64 processes sends follows from these.
"""

import sys
from collections import Counter
from pathlib import Path

sys.path += [str(Path(__file__).parents[1] / name) for name in ("helpers", "distributed")]

import torch
from workers import Workers

from ppl_vae import PPCA, VAE, fit_closed_form, fit_em, fit_svi
from ppl_vae.core import MessageLog, Processes, record_messages

COLUMNS, LATENT, RANKS = 1000, 50, 64


def rows(number, missing):
    generator = torch.Generator().manual_seed(Processes.current().rank)
    x = torch.randn(number // 2, COLUMNS, generator=generator, dtype=torch.float64)
    x[torch.rand(x.shape, generator=generator) < missing] = torch.nan
    return x


def fit(kind, iterations):
    with record_messages() as log:
        if kind == "closed form":
            x = rows(1400, 0.0)  # more than 1,000, so that a scatter matrix is summed
            fit_closed_form(PPCA(COLUMNS, LATENT, seed=0).double(), x)
        elif kind == "EM":
            x = rows(200, 0.05)
            fit_em(PPCA(COLUMNS, LATENT, seed=0).double(), x, max_iterations=iterations)
        else:
            x = torch.randn(256, COLUMNS, generator=torch.Generator().manual_seed(0))
            vae = VAE.like(x, LATENT, hidden=(500,), seed=0)
            steps = {"steps": iterations, "batch_size": 128, "capture": False}
            fit_svi(vae.model, vae.guide, x, seed=0, progress=False, **steps)
    return Counter(log.counts)


def main():
    workers = Workers(2)
    for kind in ("closed form", "EM", "SVI"):
        few = workers.run(fit, kind, 2)[0]
        log = MessageLog(few)
        if kind != "closed form":
            more = workers.run(fit, kind, 4)[0]
            per_two = more - few
            log = MessageLog(Counter({key: n / 2 for key, n in per_two.items()}))
        sent = log.sent_bytes(RANKS) / 1e6
        per = "in all" if kind == "closed form" else "per iteration"
        print(f"{kind}: {sent:.1f} MB sent by each of {RANKS} processes, {per}")
        for (name, size), number in sorted(log.counts.items(), key=lambda item: -item[0][1]):
            print(f"  {name:9} {size / 1e6:12.6f} MB x {number:g}")
    workers.close()


if __name__ == "__main__":
    main()
