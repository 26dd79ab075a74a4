"""Whether a pair that is trained in batches looks its per-datum parameters up by ``index``."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ppl_vae.core.batch import Batch
from ppl_vae.core.pair import Pair
from ppl_vae.core.program import ProgramLike
from ppl_vae.core.state import dry_run_eval, validation
from ppl_vae.objectives.bounds import batch_keywords

POSITIONS = 16
"""Rows of a batch whose parts in a parameter are told apart."""
MOST = 0.9
"""Share of a parameter's entries that is all of them, but for gradients that vanish by chance."""
CLOSE = 1e-3


def check_lookup(
    model: ProgramLike,
    guide: ProgramLike,
    named: Mapping[str, Tensor],
    x: Tensor,
    mask: Tensor | None,
    batch_size: int,
) -> None:
    """Check that no parameter belongs to places in a batch instead of rows of the data.

    A parameter of which each row of a batch has a part of its own is one of per-datum parameters.
    Two batches are compared that hold other rows at the same places, and one of them is run
    again: the parts must go with the rows, and must be the same again.

    Args:
        model, guide: a pair under the contract.
        named: its parameters by name.
        x, mask: the whole data.
        batch_size: rows of a batch, fewer than all.

    Raises:
        ValueError: naming the parameter.
    """
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)
    first, second = order[:batch_size], order[1 : batch_size + 1]
    owners = []
    with dry_run_eval(model, guide), torch.enable_grad(), validation(False):
        for rows in (first, second, first):
            run = Pair(model, guide).run(Batch(x[rows], **batch_keywords(x, mask, rows)))
            owners.append(_owners(run.log_weights()[0, :POSITIONS], list(named.values())))
    for name, before, other, again in zip(named, *owners, strict=True):
        if not _is_table(before, min(POSITIONS, batch_size)):
            continue
        if _same(before, other):
            raise ValueError(
                f"parameter {name!r} has a part for each place in a batch, so that all batches "
                "share it, whatever rows they hold. In minibatches a parameter with a row per "
                "datum must have num_data rows and be read by the keyword index, as loc[index]; "
                "or use PerDatumGuide(num_data, latent_dim), which does so"
            )
        if not _same(before, again):
            raise ValueError(
                f"parameter {name!r} has a part for each datum, but other parts are read each "
                "time for the same rows: does its plate draw rows of its own (subsample_size=)? "
                "Pass the batch's rows to it, subsample=index"
            )


def _owners(values: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """Which of the values each entry of each parameter belongs to: 1, 2, ...; 0 if to none, and
    -1 if to several.

    With weights 1 and with weights 1, 2, ... the gradients of the sum have the ratio n in an entry
    that the n-th value alone depends on.
    """
    weights = torch.arange(1, len(values) + 1, device=values.device)
    plain = _gradients(values.sum(), parameters)
    weighted = _gradients((values * weights.to(values)).sum(), parameters)
    return [_owner(a, b, len(values)) for a, b in zip(plain, weighted, strict=True)]


def _gradients(value: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True)
    pairs = zip(found, parameters, strict=True)
    return [torch.zeros_like(p) if gradient is None else gradient for gradient, p in pairs]


def _owner(plain: Tensor, weighted: Tensor, number: int) -> Tensor:
    ratio = weighted / plain
    nearest = ratio.round()
    one = (ratio - nearest).abs() < CLOSE
    owner = torch.where(one & (nearest >= 1) & (nearest <= number), nearest, -1.0)
    return torch.where((plain == 0) & (weighted == 0), 0.0, owner)


def _is_table(owner: Tensor, number: int) -> bool:
    touched = owner[owner != 0]
    if not len(touched) or number < 2:
        return False
    mine = touched[touched > 0]
    return len(mine) >= MOST * len(touched) and len(mine.unique()) == number


def _same(first: Tensor, second: Tensor) -> bool:
    touched = (first != 0) | (second != 0)
    return bool((first == second)[touched].double().mean() >= MOST)
