"""The check that a pair trained in minibatches reads per-datum parameters by ``index``."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ppl_vae.core.batch import Batch
from ppl_vae.core.pair import Pair
from ppl_vae.core.state import dry_run_eval, validation
from ppl_vae.data.sources.row_stream import Rows

MAX_ROWS = 16
"""The number of rows of a batch for which the entries of parameters are attributed."""
MIN_FRACTION = 0.9
"""The fraction of entries that counts as all of them; some gradients vanish by chance."""
TOLERANCE = 1e-3
"""The tolerance for a ratio of gradients to count as an integer."""


def check_lookup(pair: Pair, named: Mapping[str, Tensor], whole: Rows, batch_size: int) -> None:
    """Check that no parameter belongs to positions in a batch instead of rows of the data.

    A parameter is one of per-datum parameters if each row of a batch depends on its own entries.
    Two batches with different rows in the same positions are compared, and one of them is run
    twice: the entries must follow the rows, and must be the same for the same rows.

    Args:
        pair: a pair under the contract.
        named: its parameters by name.
        whole: all rows.
        batch_size: rows of a batch, fewer than all.

    Raises:
        ValueError: naming the parameter.
    """
    # Those of a large table are the first ones, which are read together.
    num_rows = len(whole) if isinstance(whole, Batch) else batch_size + 1
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(0))
    order = order.to(whole.device)
    first, second = order[:batch_size], order[1 : batch_size + 1]

    def owners(rows: Tensor) -> list[Tensor]:
        run = pair.run(whole.rows(rows))
        return _owners(run.log_weights()[0, :MAX_ROWS], list(named.values()))

    with dry_run_eval(pair.model, pair.guide), torch.enable_grad(), validation(False):
        before = owners(first)
        is_per_datum = [_is_per_datum(each, min(MAX_ROWS, batch_size)) for each in before]
        if not any(is_per_datum):
            return
        other, again = owners(second), owners(first)
    by_name = zip(named, is_per_datum, before, other, again, strict=True)
    for name, is_one, owner, of_others, repeated in by_name:
        if not is_one:
            continue
        if _equal(owner, of_others):
            raise ValueError(
                f"parameter {name!r} has entries for each position in a batch, so that all "
                "batches share it, whatever rows they hold. In minibatches a parameter with a row "
                "per datum must have num_data rows and be read by the keyword index, as "
                "loc[index]; PerDatumGuide(num_data, latent_dim) does so"
            )
        if not _equal(owner, repeated):
            raise ValueError(
                f"parameter {name!r} has entries for each datum, but different ones are read each "
                "time for the same rows: does its plate draw rows of its own (subsample_size=)? "
                "Pass the batch's rows to it, subsample=index"
            )


def _owners(values: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """Attribute each entry of each parameter to one of the values.

    The gradients of the sum with weights 1, 2, ... and with weights 1 have the ratio n in an
    entry on which only the n-th value depends.

    Returns:
        For each parameter the numbers 1, 2, ... of the values; 0 for entries on which no value
        depends, and -1 for those on which several do.
    """
    weights = torch.arange(1, len(values) + 1, device=values.device)
    plain = _gradients(values.sum(), parameters)
    weighted = _gradients((values * weights.to(values)).sum(), parameters)
    return [_owner(a, b, len(values)) for a, b in zip(plain, weighted, strict=True)]


def _gradients(value: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True)
    pairs = zip(found, parameters, strict=True)
    return [torch.zeros_like(p) if gradient is None else gradient for gradient, p in pairs]


def _owner(plain: Tensor, weighted: Tensor, num_values: int) -> Tensor:
    ratio = weighted / plain
    nearest = ratio.round()
    is_integer = (ratio - nearest).abs() < TOLERANCE
    is_owned = is_integer & (nearest >= 1) & (nearest <= num_values)
    owner = torch.where(is_owned, nearest, -1.0)
    return torch.where((plain == 0) & (weighted == 0), 0.0, owner)


def _is_per_datum(owner: Tensor, num_values: int) -> bool:
    used = owner[owner != 0]
    if not len(used) or num_values < 2:
        return False
    owned = used[used > 0]
    return len(owned) >= MIN_FRACTION * len(used) and len(owned.unique()) == num_values


def _equal(first: Tensor, second: Tensor) -> bool:
    used = (first != 0) | (second != 0)
    return bool((first == second)[used].double().mean() >= MIN_FRACTION)
