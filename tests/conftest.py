"""What every test stands on: checked shapes, an empty parameter store, a world left unchanged."""

import contextlib
import logging

import pretend_device
from shapes import check_package

# Before the package is imported for the first time.
check_package("ppl_vae")

import numpy as np  # noqa: E402
import pyro  # noqa: E402
import pyro.settings  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from pyro.poutine.runtime import _PYRO_STACK  # noqa: E402
from torch.distributions import Distribution  # noqa: E402

import pretend_run  # noqa: E402
from ppl_vae.capture.compiled import CompiledFunction  # noqa: E402
from pretend_exceptions import EXCEPTIONS  # noqa: E402


def pytest_addoption(parser):
    parser.addoption(
        "--pretend-gpu",
        action="store_true",
        help="run tests on a pretended accelerator; see tests/pretend_run.py",
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
    # Tensors are small here: a second thread would only be waited for.
    torch.set_num_threads(1)
    # beartype finds typing.Callable among the bases of Pyro's distributions.
    config.addinivalue_line(
        "filterwarnings", "ignore::beartype.roar.BeartypeDecorHintPep585DeprecationWarning"
    )


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


def global_state():
    """What a library must not change for longer than a call."""
    loggers = ("", "pyro", "torch", "ppl_vae")
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "torch validation": Distribution._validate_args,
        "pyro settings": dict(pyro.settings.get()),
        "pyro handlers": len(_PYRO_STACK),
        "gradients enabled": torch.is_grad_enabled(),
        "anomaly detection": torch.is_anomaly_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "log handlers": {name: list(logging.getLogger(name).handlers) for name in loggers},
        "log levels": {name: logging.getLogger(name).level for name in loggers},
        "numpy errors": np.geterr(),
    }


def restore(state):
    torch.set_default_dtype(state["default dtype"])
    pyro.settings.set(**state["pyro settings"])
    Distribution.set_default_validate_args(state["torch validation"])
    del _PYRO_STACK[state["pyro handlers"] :]
    torch.set_grad_enabled(state["gradients enabled"])
    torch.autograd.set_detect_anomaly(state["anomaly detection"])
    torch.use_deterministic_algorithms(state["deterministic algorithms"])
    torch.set_float32_matmul_precision(state["matmul precision"])
    torch.set_num_threads(state["threads"])
    for name, level in state["log levels"].items():
        logging.getLogger(name).setLevel(level)
    np.seterr(**state["numpy errors"])


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
