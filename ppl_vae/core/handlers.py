"""Pyro handlers that raise an error, naming the site, where a pair violates the contract of
programs."""

from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.util import site_is_subsample


class DistinctNames(Messenger):
    """Refuses a program in which a parameter and a sample site share a name."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: dict[str, str] = {}

    def _process_message(self, msg: Any) -> None:
        kind = "parameter" if msg["type"] == "param" else "site"
        if msg["type"] in ("param", "sample") and self.kinds.setdefault(msg["name"], kind) != kind:
            raise ValueError(
                f"{msg['name']!r} is the name of a pyro.param and of a pyro.sample in one "
                f"program; give the parameter a name of its own, such as '{msg['name']}_loc'"
            )


class CheckedReplay(ReplayMessenger):
    """Replays a guide's draws in the model, and refuses those that would be broadcast there."""

    def _pyro_sample(self, msg: Any) -> None:
        site: Any = self.trace.nodes.get(msg["name"]) if self.trace is not None else None
        if site is not None and site["type"] == "param":
            raise ValueError(
                f"{msg['name']!r} is a pyro.param in the guide and a pyro.sample in the model; "
                f"give the parameter a name of its own, such as '{msg['name']}_loc', and let the "
                "guide sample the site"
            )
        if site is not None and not msg["is_observed"] and not site_is_subsample(msg):
            ours, theirs = _event_shape(site), _event_shape(msg)
            if ours != theirs:
                raise ValueError(
                    f"site {msg['name']!r} has event shape {tuple(ours)} in the guide and "
                    f"{tuple(theirs)} in the model; is latent_dim the same, and to_event(1) there?"
                )
        super()._pyro_sample(msg)


def _event_shape(site: Any) -> torch.Size:
    return torch.Size(site["fn"].event_shape)
