"""Progress of fits in a notebook, with the front end replaced by a list of its outputs."""

import re
import sys
import types

import pytest
import torch

from ppl_vae import PPCA, ExactGuide, fit_svi
from ppl_vae.inference.svi.progress import progress_bar


class ZMQInteractiveShell:
    """The class of the shell in a Jupyter kernel."""


@pytest.mark.parametrize("fails", [False, True])
def test_progress_in_a_notebook_is_one_output_that_keeps_its_last_state(monkeypatch, fails):
    states = []

    def display(content, *, raw, display_id):
        assert raw and display_id
        states.append(content)
        return types.SimpleNamespace(update=lambda content, raw: states.append(content))

    shell = types.SimpleNamespace(get_ipython=ZMQInteractiveShell)
    monkeypatch.setitem(sys.modules, "IPython", shell)
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=display))
    monkeypatch.setattr("ppl_vae.inference.svi.progress.REFRESH_SECONDS", 0.0)
    if fails:
        with pytest.raises(KeyboardInterrupt), progress_bar(30, "auto") as show:
            show(3, -1.5)
            raise KeyboardInterrupt
        assert states[-2]["text/plain"].startswith("SVI: 3/30, -1.500 nats per datum, ")
        assert states[-1]["text/plain"] == "SVI: 3/30, -1.500 nats per datum"
        return
    ppca = PPCA(3, 1, seed=0)
    fit_svi(ppca.model, ExactGuide(ppca), torch.randn(20, 3), steps=30)
    assert states[0]["text/plain"] == "SVI: 0/30"
    assert re.fullmatch(r"SVI: 30/30, -?\d+\.\d{3} nats per datum", states[-1]["text/plain"])
    assert '<progress value="30" max="30">' in states[-1]["text/html"]
