"""Constructor calls are recorded, printed and compared."""

import copy
from dataclasses import dataclass

import numpy as np
import pyro.distributions as dist
import torch
from torch import nn

from ppl_vae import Gaussian
from ppl_vae.core.config import (
    ArrayValue,
    ConstructorCall,
    OpaqueValue,
    configurable,
    constructor_call,
    describe,
)
from ppl_vae.core.program import Program
from ppl_vae.networks import GaussianNoise


class Model(Program):
    @configurable
    def __init__(self, size, *, kind="a", seed=None):
        super().__init__()
        self.size = size

    @classmethod
    @configurable
    def with_options(cls, *sizes, kind="b"):
        return cls(sum(sizes), kind=kind)


class Inherited(Model):
    pass


class WithConstructor(Model):
    def __init__(self):
        super().__init__(3)


@configurable
def make_model(size=7):
    return Model(size)


def test_defaults_are_recorded_and_seeds_are_not():
    model = Model(3, seed=1)
    assert constructor_call(model) == ConstructorCall("Model", {"size": 3, "kind": "a"})
    assert model.config() == {"size": 3, "kind": "a"}
    assert repr(model) == 'Model(size=3, kind="a")'


def test_class_methods_and_functions_are_recorded_instead_of_the_constructors_they_call():
    assert repr(Model.with_options(1, 2)) == 'Model.with_options(sizes=(1, 2), kind="b")'
    assert repr(Inherited.with_options(1)) == 'Inherited.with_options(sizes=(1,), kind="b")'
    assert repr(make_model()) == "make_model(size=7)"


def test_a_subclass_is_recorded_only_under_its_own_arguments():
    assert repr(Inherited(2)) == 'Inherited(size=2, kind="a")'
    assert constructor_call(WithConstructor()) is None
    assert WithConstructor().config() is None


def test_copies_keep_their_call():
    model = Model(3)
    assert repr(copy.deepcopy(model)) == repr(model)


def test_arguments_are_described_by_plain_values_and_calls():
    @dataclass(frozen=True)
    class Point:
        x: float

    assert describe(np.int64(3)) == 3 and type(describe(np.int64(3))) is int
    assert describe([1, (2, "a")]) == (1, (2, "a"))
    assert describe(None) is None
    assert repr(describe(Gaussian(0.5))) == "Gaussian(scale=0.5, initial=1.0, floor=0.0001)"
    assert describe(GaussianNoise(0.1)) == ConstructorCall("GaussianNoise", {"scale": 0.1})
    assert repr(describe(Point(1.5))) == "Point(x=1.5)"
    assert describe(nn.Linear(2, 3)) == OpaqueValue("Linear(...)")
    assert describe(np.tanh) == OpaqueValue("tanh")
    assert repr(describe(dist.Normal(0.0, 0.1))) == "Normal(loc=0, scale=0.1)"
    wide = describe(dist.Gamma(torch.arange(1.0, 5.0)[:, None], 2.0))
    assert repr(wide) == "Gamma(concentration=[1, 2, 3, ...], rate=[2, 2, 2, ...])"
    assert wide.arguments["concentration"] == ArrayValue(((1.0,), (2.0,), (3.0,), (4.0,)))


def test_a_call_prints_as_python_without_arguments_that_are_none():
    inner = ConstructorCall("g", {})
    call = ConstructorCall("f", {"a": None, "b": 'a "quoted" word', "c": (1,), "d": inner})
    assert repr(call) == r'f(b="a \"quoted\" word", c=(1,), d=g())'
