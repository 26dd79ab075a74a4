"""Errors of a pair that gives numbers that are not finite, with the site and the rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro.poutine.messenger import Messenger

from ppl_vae.core.batch import Batch
from ppl_vae.core.nonfinite import describe_nonfinite_pair, describe_parameters
from ppl_vae.core.pair import Pair
from ppl_vae.core.state import kept_generators, validation


@contextmanager
def nonfinite_sites_named(pair: Pair, batch: Batch) -> Iterator[None]:
    """Context manager: a numerical error of the pair on these rows names the site and the rows.

    Without Pyro's validation, numbers that are not finite are found only where they are used. The
    pair is run once more then; nothing is done if there is no error.

    Raises:
        FloatingPointError: in place of a FloatingPointError or RuntimeError, if a site is not
            finite.
    """
    try:
        yield
    except (FloatingPointError, RuntimeError) as error:
        found = _nonfinite_site(pair, batch)
        if found is None:
            raise
        raise FloatingPointError(
            f"{found}; are x and the parameters of the pair finite?"
        ) from error


class _LastSite(Messenger):
    """Keeps the message of the site that is drawn, which a draw that fails leaves behind."""

    message: Any = None

    def _pyro_sample(self, message: Any) -> None:
        self.message = message


@torch.no_grad()
def _nonfinite_site(pair: Pair, batch: Batch) -> str | None:
    last = _LastSite()
    with kept_generators([]), validation(False):
        try:
            with last:
                run = pair.run(batch)
        except (RuntimeError, ValueError):
            if last.message is None:
                return None
            return describe_parameters(last.message, "guide", batch)
    return describe_nonfinite_pair(run, batch)
