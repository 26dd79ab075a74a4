"""Every test checks shapes, has an empty parameter store, and leaves global state unchanged."""

import contextlib
from pathlib import Path

import pretend_device
from shapes import check_package

# Before the package is imported for the first time.
check_package("ppl_vae")

import pyro  # noqa: E402
import pyro.settings  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

import digests  # noqa: E402
import pretend_run  # noqa: E402
from global_state import global_state, restore  # noqa: E402
from ppl_vae.capture import policy  # noqa: E402
from ppl_vae.capture.compiled import CompiledFunction  # noqa: E402
from pretend_exceptions import EXCEPTIONS  # noqa: E402


def pytest_addoption(parser):
    parser.addoption(
        "--pretend-gpu",
        action="store_true",
        help="run tests on a pretended accelerator; see tests/helpers/pretend_run.py",
    )
    parser.addoption(
        "--digests",
        metavar="FILE",
        help="write digests of the package's results in each test; see tests/helpers/digests.py",
    )


def pytest_configure(config):
    if config.getoption("--pretend-gpu"):
        pretend_device.register()
        if pretend_device.STATE.unsupported:
            raise pytest.UsageError(f"--pretend-gpu: {pretend_device.STATE.unsupported}")
        moved = contextlib.ExitStack()
        moved.enter_context(pretend_run.on_pretended_device())
        config.pretended_waits = moved.enter_context(pretend_device.count_waits())
        config.add_cleanup(moved.close)
    if file := config.getoption("--digests"):
        products = contextlib.ExitStack()
        products.enter_context(digests.products_of_torch())
        config.add_cleanup(products.close)
        config.pluginmanager.register(digests.DigestPlugin(Path(file)))
    # Tensors are small here: a second thread would only be waited for.
    torch.set_num_threads(1)
    # beartype finds typing.Callable among the bases of Pyro's distributions.
    config.addinivalue_line(
        "filterwarnings", "ignore::beartype.roar.BeartypeDecorHintPep585DeprecationWarning"
    )


USERS_OF_THE_SMALL_LINEAGE = (
    "tests/lineage/test_lineage.py",
    "tests/lineage/test_report_data.py",
    "tests/plots/test_plots.py",
    "tests/report/test_page.py",
)
USERS_OF_SEVERAL_PROCESSES = "tests/distributed/"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Whole files to each process.

    Files that share a fitted lineage, or groups of processes, run in the same one.
    """
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class LoadFilesThatShareScheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            if file.startswith(USERS_OF_SEVERAL_PROCESSES):
                return USERS_OF_SEVERAL_PROCESSES
            return "small lineage" if file in USERS_OF_THE_SMALL_LINEAGE else file

    return LoadFilesThatShareScheduling(config, log)


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--pretend-gpu"):
        return
    for item in items:
        if reason := EXCEPTIONS.get(item.nodeid.split("[")[0]):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter, config):
    # With several processes each has a count of its own: run with -n0 for the report.
    if waits := getattr(config, "pretended_waits", None):
        terminalreporter.section("waiting for the pretended accelerator")
        terminalreporter.write("\n".join(pretend_run.counted_report(waits)) + "\n")


@pytest.fixture(autouse=True)
def unchanged_world():
    """An empty parameter store to start from; a failure for a test that changes global state."""
    pyro.clear_param_store()
    before = global_state()
    yield
    after = global_state()
    pyro.clear_param_store()
    changed = {k: (before[k], after[k]) for k in before if before[k] != after[k]}
    if changed:
        restore(before)
    assert not changed, f"the test changed global state: {changed}"


@pytest.fixture(autouse=True)
def unmeasured_compiler(monkeypatch):
    """What is compiled does not depend on the compilations that this machine has measured."""
    monkeypatch.setattr(policy, "measured_time", lambda: None)


@pytest.fixture
def float64():
    """Double precision by default, for one test: for programs that make tensors of their own."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield torch.float64
    torch.set_default_dtype(before)


@pytest.fixture
def uncompiled(monkeypatch):
    """Captured code is recorded and not compiled, which is faster and gives the same results."""
    compiled = CompiledFunction.__init__

    def not_compiled(self, *args, **options):
        compiled(self, *args, **(options | {"compiled": False}))

    monkeypatch.setattr(CompiledFunction, "__init__", not_compiled)
