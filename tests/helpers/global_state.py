"""Settings of the process that no test may change, its generators and Pyro's parameters."""

import logging
import random
import sys

import numpy as np
import pyro
import pyro.settings
import torch
from pyro.poutine.runtime import _PYRO_STACK
from torch.distributions import Distribution


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
        "traceback limit": vars(sys).get("tracebacklimit"),
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


def generators():
    """The states of the global generators, comparable."""
    numpy = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), (numpy[1].tolist(), *numpy[2:])


def store_names():
    return sorted(pyro.get_param_store().keys())
