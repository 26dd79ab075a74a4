"""Lineages of data on an accelerator, and of data on the CPU beside one."""

import pytest
import torch

import oracles
import pretend_device
from lineages import TINY, table
from ppl_vae.core.introspection import modules_of
from ppl_vae.lineage import report_data, run_lineage
from pretend_device import pretended_device

pretend_device.register()
pytestmark = pytest.mark.skipif(
    bool(pretend_device.STATE.unsupported), reason=pretend_device.STATE.unsupported
)


def lineage(x, stages):
    return run_lineage(x, latent_dim=2, stages=stages, settings=TINY, seed=1)


def devices_of(found):
    pairs = [modules_of(*pair) for pair in found.pairs.values()]
    return {p.device.type for modules in pairs for m in modules for p in m.parameters()}


def reported_lineage(x, stages, *, on_device):
    """A lineage whose pairs are on the device of x, and which can be reported."""
    with pretended_device() as device:
        found = lineage(x.to(device) if on_device else x, stages)
        assert devices_of(found) == {device.type if on_device else "cpu"}
        report = report_data(found, image_shape=(2, 3))
    observed = x[~x.isnan()]
    assert report.reconstructions.limits == (float(observed.min()), float(observed.max()))
    return found


def test_a_lineage_of_a_table_on_the_cpu_stays_there():
    with pretended_device():
        found = lineage(torch.from_numpy(table()[:30]), ["linear-amortized"])
    assert devices_of(found) == {"cpu"}


@pytest.mark.slow
@pytest.mark.parametrize("on_device", [False, True], ids=["cpu", "accelerator"])
@pytest.mark.parametrize("missing", [0.0, 0.1])
def test_all_stages_have_the_results_of_the_cpu(missing, on_device):
    x = oracles.with_missing_values(table()[:80], missing, seed=1) if missing else table()[:80]
    x = torch.from_numpy(x)
    expected = lineage(x, None)
    found = reported_lineage(x, None, on_device=on_device)
    assert len(expected.rows) == len(found.rows) > 0
    for row, other in zip(expected.rows, found.rows, strict=True):
        assert row.log_p.value == pytest.approx(other.log_p.value, abs=1e-6), row.stage
