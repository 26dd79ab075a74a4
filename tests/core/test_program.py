"""The contract: names, plates, what is passed on to a program, and data at the boundary."""

import copy
import functools
import io
import pickle
from contextlib import nullcontext

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule
from torch import nn

from ppl_vae.core.arrays.inputs import as_data_and_mask, as_rows
from ppl_vae.core.introspection import (
    accepted_kwargs,
    bound_object,
    filter_kwargs,
    modules_of,
    placement,
)
from ppl_vae.core.program import Program, count_rows, data_plate, fold_rows
from ppl_vae.core.state import train_mode
from ppl_vae.core.validation import as_matrix, check_int, check_option
from ppl_vae.guides.guides import AmortizedGuide, ExactGuide, PerDatumGuide
from ppl_vae.likelihoods.gaussian import Gaussian
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.vae import VAE
from ppl_vae.networks.mlp_conv import mlp
from ppl_vae.objectives.bounds import log_weights
from user_pairs import PAIRS

# Names

PROGRAMS = {
    "ppca": lambda: PPCA(4, 2, seed=0),
    "vae": lambda: VAE.mlp(4, 2, hidden=(5,), seed=0),
    "mean field": lambda: PerDatumGuide(6, 2),
    "amortized": lambda: AmortizedGuide(mlp(4, 4, seed=0), 2),
    "exact": lambda: ExactGuide(PPCA(4, 2, seed=0)),
    "likelihood": lambda: Gaussian("shared"),
}

X = torch.linspace(-2, 2, 24).reshape(6, 4)


def pair_of(program):
    if isinstance(program, VAE):
        return program.model, program.guide
    return (program.model, AmortizedGuide(mlp(4, 4, seed=1), 2))


def train(model, guide, x, steps=3, loss=None):
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss or Trace_ELBO())
    return [svi.step(x) for _ in range(steps)]


def parameter_values(*modules):
    return [p.detach().clone() for module in modules for p in module.parameters()]


def all_moved(before, after):
    return all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def none_moved(before, after):
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def names_of(module):
    return {m._pyro_name for m in module.modules() if isinstance(m, PyroModule)}


def by_deepcopy(program):
    return copy.deepcopy(program)


def by_pickle(program):
    return pickle.loads(pickle.dumps(program))


def by_torch_save(program):
    file = io.BytesIO()
    torch.save(program, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [by_deepcopy, by_pickle, by_torch_save]


@pytest.mark.parametrize("make", PROGRAMS.values(), ids=PROGRAMS)
def test_no_two_instances_share_a_name(make):
    first, second = make(), make()
    assert names_of(first).isdisjoint(names_of(second))
    assert all(names_of(module) for module in (first, second))


@pytest.mark.parametrize("duplicate", COPIES)
@pytest.mark.parametrize("make", PROGRAMS.values(), ids=PROGRAMS)
def test_a_copy_has_names_of_its_own(make, duplicate):
    original = make()
    first, second = duplicate(original), duplicate(original)
    assert names_of(original).isdisjoint(names_of(first))
    assert names_of(first).isdisjoint(names_of(second))
    assert none_moved(parameter_values(original), parameter_values(first))


@pytest.mark.parametrize("duplicate", [lambda vae: vae, *COPIES])
def test_names_of_parts_begin_with_the_name_of_the_whole(duplicate):
    vae = duplicate(VAE.mlp(4, 2, seed=0))
    assert vae.guide._pyro_name == f"{vae._pyro_name}.guide"
    assert vae.likelihood._pyro_name == f"{vae._pyro_name}.likelihood"


def test_a_guide_that_refers_to_a_model_does_not_rename_it():
    ppca = PPCA(4, 2, seed=0)
    name = ppca._pyro_name
    guide = ExactGuide(ppca)
    assert ppca._pyro_name == name
    assert list(guide.parameters()) == []


def test_a_part_of_another_model_is_refused():
    likelihood = Gaussian("shared")
    VAE.mlp(4, 2, likelihood=likelihood)
    with pytest.raises(ValueError, match="likelihood belongs to another model already"):
        VAE.mlp(4, 2, likelihood=likelihood)
    VAE.mlp(4, 2, likelihood=copy.deepcopy(likelihood))


@pytest.mark.parametrize("duplicate", COPIES)
@pytest.mark.parametrize("make", [PROGRAMS["ppca"], PROGRAMS["vae"]], ids=["ppca", "vae"])
def test_a_copy_of_a_trained_model_trains_alone(make, duplicate):
    original = make()
    train(*pair_of(original), X)
    duplicated = duplicate(original)
    before, mine = parameter_values(original), parameter_values(duplicated)
    assert none_moved(before, mine)
    train(*pair_of(duplicated), X)
    assert none_moved(before, parameter_values(original))
    assert all_moved(mine, parameter_values(duplicated))


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])
def test_many_models_train_in_one_process_each_moving_its_own_parameters(loss):
    narrow = VAE.mlp(4, 2, hidden=(5,), seed=0)
    models = [narrow, VAE.mlp(4, 2, hidden=(5,), seed=1), VAE.mlp(4, 3, hidden=(7,), seed=2)]
    train(narrow.model, narrow.guide, X, loss=loss())
    models.append(copy.deepcopy(narrow))
    for vae in models:
        others = [other for other in models if other is not vae]
        mine, theirs = parameter_values(vae), parameter_values(*others)
        train(vae.model, vae.guide, X, loss=loss())
        assert all_moved(mine, parameter_values(vae))
        assert none_moved(theirs, parameter_values(*others))


def test_many_exact_guides_train_in_one_process():
    models = [PPCA(4, 2, seed=0), PPCA(4, 2, seed=0), PPCA(4, 1, seed=0)]
    models.append(copy.deepcopy(models[0]))
    for ppca in models:
        others = [other for other in models if other is not ppca]
        mine, theirs = parameter_values(ppca), parameter_values(*others)
        train(ppca.model, ExactGuide(ppca), X)
        assert all_moved(mine, parameter_values(ppca))
        assert none_moved(theirs, parameter_values(*others))


def test_frozen_parameters_stay_frozen():
    """Pyro's store makes every parameter that it is given require a gradient."""
    ppca, guide = PPCA(4, 2, seed=0), PerDatumGuide(6, 2)
    for frozen in (
        ppca.loadings,
        ppca.loc,
        ppca.noise_scale_unconstrained,
        guide.unconstrained_scale,
    ):
        frozen.requires_grad_(False)
    before = parameter_values(ppca, guide)
    train(ppca.model, guide, X)
    log_weights(ppca.model, guide, X, 2)
    frozen, trained = parameter_values(ppca), guide.loc
    assert none_moved(before, [*frozen, before[3], guide.unconstrained_scale])
    assert not torch.equal(trained, before[3])
    parameters = (*ppca.parameters(), guide.loc, guide.unconstrained_scale)
    assert [p.requires_grad for p in parameters] == [False, False, False, True, False]


def test_two_equal_instances_train_equally():
    losses = []
    for _ in range(2):
        vae = VAE.mlp(4, 2, hidden=(5,), seed=0)
        torch.manual_seed(3)
        losses.append(train(vae.model, vae.guide, X, steps=5))
    assert losses[0] == losses[1]


def test_the_state_dict_is_the_whole_state():
    vae, other = VAE.mlp(4, 2, hidden=(5,), seed=0), VAE.mlp(4, 2, hidden=(5,), seed=1)
    train(vae.model, vae.guide, X)
    other.load_state_dict(vae.state_dict())
    for program in (vae.model, vae.guide), (other.model, other.guide):
        torch.manual_seed(0)
        program_trace = poutine.trace(program[0]).get_trace(X)
        torch.manual_seed(0)
        losses = Trace_ELBO().loss(*program, X)
        if program[0].__self__ is vae:
            expected = program_trace.log_prob_sum(), losses
        else:
            assert (program_trace.log_prob_sum(), losses) == expected


def test_a_program_may_be_part_of_a_strangers_module():
    class Both(PyroModule):
        def __init__(self):
            super().__init__("both")
            self.vae = VAE.mlp(4, 2, hidden=(5,), seed=0)

        def model(self, x):
            return self.vae.model(x)

        def guide(self, x):
            return self.vae.guide(x)

    both = Both()
    assert names_of(both) == {"both", "both.vae", "both.vae.guide", "both.vae.likelihood"}
    before = parameter_values(both)
    train(both.model, both.guide, X)
    assert all_moved(before, parameter_values(both))


# The plate over data


def test_the_plate_holds_all_rows():
    with data_plate(5) as rows:
        assert rows.tolist() == [0, 1, 2, 3, 4]


def test_the_plate_of_a_minibatch_is_scaled_to_the_whole():
    with poutine.trace() as trace, data_plate(2, index=torch.tensor([7, 3]), num_data=10) as rows:
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0))
    assert rows.tolist() == [7, 3]
    assert trace.trace.nodes["z"]["scale"] == 5


def test_an_index_of_another_length_is_refused():
    with pytest.raises(ValueError, match="index has 3 entries for 2 rows of x"):
        data_plate(2, index=torch.arange(3), num_data=10)


def test_rows_are_those_of_x_or_the_number_asked_for():
    assert count_rows(X, None) == count_rows(X, 100) == 6
    assert count_rows(None, 3) == 3
    with pytest.raises(ValueError, match="give x, or num_data=n"):
        count_rows(None, None)


# Networks


@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 5, 3), (4, 2, 5, 3), (0, 3)])
def test_a_network_sees_rows_and_its_output_is_folded_back(shape):
    observed = []

    def network(rows):
        observed.append(rows.shape)
        return rows @ torch.arange(6.0).reshape(3, 2)

    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    out = fold_rows(network, values, 2, "decoder")
    torch.testing.assert_close(out, values @ torch.arange(6.0).reshape(3, 2))
    assert [len(s) for s in observed] == [2]


@pytest.mark.parametrize(
    "bad", [lambda z: z, lambda z: z[:, :2].T, lambda z: z.sum(), lambda z: z[:1, :2]]
)
def test_a_network_of_another_width_is_refused(bad):
    with pytest.raises(ValueError, match=r"the decoder must return \(rows, 2\); for 5 rows"):
        fold_rows(bad, torch.ones(5, 3), 2, "decoder")


# What is passed on

EVERYTHING = {"mask": 1, "index": 2, "num_data": 3, "observe": None}


class Bound:
    def tutorial(self, x):
        return x

    def indexed(self, x, index=None):
        return x


class CalledProgram(Program):
    def forward(self, x, *, num_data=None):
        return x


def keyword_eater(x, **_):
    return x


@pytest.mark.parametrize(
    ("program", "passed"),
    [
        (lambda x: x, set()),
        (Bound().tutorial, set()),
        (Bound().indexed, {"index"}),
        (CalledProgram(), {"num_data"}),
        (keyword_eater, {"mask", "index", "num_data"}),
        (functools.partial(Bound().indexed, index=None), {"index"}),
        (poutine.block(Bound().tutorial), set()),
        (poutine.condition(Bound().indexed, data={}), {"index"}),
        (poutine.block(poutine.mask(CalledProgram(), mask=True)), {"num_data"}),
        (pyro.plate("more", 2, dim=-3)(Bound().indexed), {"index"}),
        (poutine.trace(Bound().indexed), {"index"}),
    ],
)
def test_only_keywords_that_a_program_takes_are_passed_on(program, passed):
    assert filter_kwargs(program, EVERYTHING) == {k: EVERYTHING[k] for k in passed}


def test_the_keywords_of_a_signature():
    assert accepted_kwargs(Bound().indexed) == ({"x", "index"}, False)
    assert accepted_kwargs(keyword_eater) == ({"x"}, True)


OWNER = Bound()
MODULE = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("program", "owner"),
    [
        (OWNER.tutorial, OWNER),
        (MODULE, MODULE),
        (keyword_eater, keyword_eater),
        (functools.partial(OWNER.indexed, index=None), OWNER),
        (poutine.condition(OWNER.tutorial, data={}), OWNER),
        (poutine.block(poutine.mask(MODULE, mask=True)), MODULE),
        (poutine.scale(keyword_eater, scale=2.0), keyword_eater),
        (pyro.plate("more", 2, dim=-3)(OWNER.tutorial), OWNER),
        (poutine.trace(OWNER.tutorial), OWNER),
    ],
    ids=[
        "method",
        "module",
        "function",
        "partial",
        "condition",
        "nested",
        "scale",
        "plate",
        "trace",
    ],
)
def test_the_owner_of_a_program_is_found_through_what_wraps_it(program, owner):
    assert bound_object(program) is owner


def test_modules_are_found_around_functions_and_behind_guides():
    encoder, ppca = nn.Linear(2, 2), PPCA(4, 2, seed=0)

    def inner(x):
        return encoder(x)

    def program(x):
        return MODULE(inner(x))

    assert modules_of(inner) == [encoder]
    assert set(modules_of(program)) == {encoder, MODULE}
    guide = ExactGuide(ppca)
    assert modules_of(guide) == [guide, ppca]
    assert modules_of(ppca.model, guide) == [ppca, guide]


NETS = {"mine": nn.Linear(2, 5), "other": nn.Linear(3, 3)}
LAYERS, KEY = [nn.Linear(1, 1), nn.Linear(2, 2)], "mine"


class Holder:
    def __init__(self):
        self.nets, self.unused, self.depth = dict(NETS), nn.Linear(4, 4), LAYERS

    def program(self, x):
        return self.helper(x)

    def helper(self, x):
        return self.nets["mine"](self.depth[1](x))

    def __call__(self, x):
        return self.program(x)


def by_key(x):
    return NETS["mine"](x)


def by_named_key(x):
    return NETS[KEY](x)


def by_loop(x):
    return sum(net(x) for net in NETS.values())


def by_unknown_key(x, key="mine"):
    return NETS[key](x)


def by_place(x):
    return [LAYERS[1](value) for value in x]


def by_default(x, net=LAYERS[0]):
    return net(x)


HOLDER = Holder()


@pytest.mark.parametrize(
    ("program", "used"),
    [
        (by_key, [NETS["mine"]]),
        (by_named_key, [NETS["mine"]]),
        (by_loop, list(NETS.values())),
        (by_unknown_key, list(NETS.values())),
        (by_place, [LAYERS[1]]),
        (by_default, [LAYERS[0]]),
        (HOLDER.program, [NETS["mine"], LAYERS[1]]),
        (HOLDER, [NETS["mine"], LAYERS[1]]),
        (functools.partial(by_default, net=LAYERS[1]), LAYERS),
        (poutine.scale(by_key, scale=2.0), [NETS["mine"]]),
        (lambda x: HOLDER.nets["other"](x), [NETS["other"]]),
    ],
    ids=[
        "key",
        "named key",
        "loop",
        "unknown key",
        "place",
        "default",
        "method",
        "object",
        "partial",
        "handler",
        "attribute",
    ],
)
def test_only_the_networks_that_a_program_uses_are_its_own(program, used):
    assert set(modules_of(program)) == set(used)


def test_a_network_that_is_not_used_stays_in_training_mode():
    with train_mode(by_key, training=False):
        assert not NETS["mine"].training and NETS["other"].training


def test_a_function_may_refer_to_itself():
    def program(x, depth=2):
        return program(x, depth - 1) if depth else MODULE(x)

    assert modules_of(program) == [MODULE]


@pytest.mark.parametrize("name", PAIRS)
def test_the_dtype_of_any_pair_is_found_or_left_open(name, float64):
    model, guide, _ = PAIRS[name]()
    assert placement(model, guide) in ({}, {"dtype": float64, "device": torch.device("cpu")})


def test_the_placement_is_that_of_the_model():
    assert placement(PPCA(4, 2, seed=0).double().model)["dtype"] == torch.float64
    conditioned = poutine.condition(PPCA(4, 2, seed=0).model, data={})
    assert placement(conditioned)["dtype"] == torch.float32
    assert placement(keyword_eater) == {}


# Data at the boundary

ROWS = [[1, 2, 3], [4, 5, 6]]


def read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "x",
    [
        ROWS,
        tuple(map(tuple, ROWS)),
        np.array(ROWS),
        np.array(ROWS, dtype="u2"),
        np.array(ROWS, dtype="u8"),
        np.array(ROWS, dtype="i1"),
        np.array(ROWS, dtype="f2"),
        np.array(ROWS, dtype="f4"),
        np.array(ROWS, dtype=">f8"),
        np.array(ROWS, dtype=np.longdouble),
        np.asfortranarray(np.array(ROWS, dtype=float)),
        np.array(ROWS, dtype=float)[::-1][::-1],
        read_only(np.array(ROWS, dtype=float)),
        pd.DataFrame(ROWS, columns=list("abc")),
        pd.DataFrame(ROWS, columns=list("abc"), dtype="Int64"),
        torch.tensor(ROWS),
        torch.tensor(ROWS, dtype=torch.uint8),
        torch.tensor(ROWS, dtype=torch.float16),
        torch.tensor(ROWS, dtype=torch.float64),
    ],
    ids=lambda x: f"{type(x).__name__}-{getattr(x, 'dtype', '')}",
)
def test_numbers_of_any_kind_become_a_matrix(x):
    coarse = str(getattr(x, "dtype", "")).endswith("float16")
    raised = pytest.warns(UserWarning, match="x is of float16") if coarse else nullcontext()
    with raised:
        matrix = as_matrix(x, dtype=torch.float64)
        assert as_matrix(x).is_floating_point()
    assert matrix.dtype == torch.float64
    assert matrix.tolist() == ROWS


def test_booleans_become_zeros_and_ones():
    assert as_matrix(np.array([[True, False]])).tolist() == [[1.0, 0.0]]


def test_missing_values_of_pandas_become_nan():
    x = as_matrix(pd.DataFrame({"a": pd.array([1, None], dtype="Int64"), "b": [0.5, np.nan]}))
    assert x.isnan().tolist() == [[False, False], [True, True]]


def test_a_tensor_keeps_its_place_without_its_gradient():
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    assert as_matrix(x).data_ptr() == x.data_ptr()
    assert not as_matrix(x).requires_grad
    assert as_matrix(x.int()).dtype == torch.get_default_dtype()


def test_the_users_array_is_not_changed():
    x = np.array([[1.0, np.nan], [2.0, 3.0]])
    before = x.copy()
    tensor, _ = as_data_and_mask(x, model=keyword_eater)
    tensor += 1
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        (np.ones(3), ValueError, r"x must be 2-d.*shape \(3,\).*x\[None\]"),
        (np.ones((2, 3, 4)), ValueError, r"x must be 2-d.*x\.reshape\(len\(x\), -1\)"),
        (3.0, ValueError, "x must be 2-d"),
        (np.ones((0, 3)), ValueError, r"x is empty: its shape is \(0, 3\)"),
        (np.ones((3, 0)), ValueError, "x is empty"),
        (np.array([[np.inf, 1.0, -np.inf]]), ValueError, "x has 2 infinite entries"),
        (np.array([["a", "b"]]), TypeError, "x must hold numbers"),
        (np.array([[object()]]), TypeError, "x must hold numbers.*object"),
        (np.array([["2020-01-01"]], dtype="M8[D]"), TypeError, "x must hold numbers.*datetime64"),
        (np.array([[1j]]), TypeError, "x has complex entries"),
        (torch.ones(1, 1, dtype=torch.complex64), TypeError, "x has complex entries"),
        (
            pd.DataFrame({"size": [1.0], "colour": ["red"]}),
            TypeError,
            r"columns that are not numeric: \['colour'\]",
        ),
    ],
)
def test_what_is_no_matrix_of_numbers_is_refused(x, error, match):
    with pytest.raises(error, match=match):
        as_matrix(x)


def test_messages_call_the_data_by_its_name():
    with pytest.raises(ValueError, match="x_val must be 2-d"):
        as_matrix(np.ones(3), name="x_val")


def test_missing_values_are_nan_or_false_in_the_mask():
    x = torch.tensor([[1.0, float("nan"), 3.0], [4.0, 5.0, 6.0]])
    mask = torch.tensor([[False, True, True], [True, True, True]])
    filled, observed = as_data_and_mask(x, mask, model=keyword_eater)
    assert observed.tolist() == [[False, False, True], [True, True, True]]
    assert filled.tolist() == [[0.0, 0.0, 3.0], [4.0, 5.0, 6.0]]


def test_without_missing_values_there_is_no_mask():
    x, mask = as_data_and_mask(np.ones((2, 3)), np.ones((2, 3), dtype=bool), model=keyword_eater)
    assert mask is None
    assert x.tolist() == [[1.0] * 3] * 2


def test_data_go_to_the_dtype_of_the_pair():
    vae = VAE.mlp(3, 1, seed=0).double()
    x, _ = as_data_and_mask(np.ones((2, 3), dtype="f4"), model=vae.model, guide=vae.guide)
    assert x.dtype == torch.float64


@pytest.mark.parametrize(
    ("x", "mask", "match"),
    [
        (torch.ones(2, 3), torch.ones(2, 2, dtype=torch.bool), r"mask must be boolean.*\(2, 3\)"),
        (torch.ones(2, 3), torch.ones(2, 3), "mask must be boolean.*float32"),
        (torch.full((2, 3), torch.nan), None, r"x has rows with nothing observed: \[0, 1\]"),
        (torch.ones(2, 1), torch.tensor([[True], [False]]), r"rows with nothing observed: \[1\]"),
    ],
)
def test_bad_masks_are_refused(x, mask, match):
    with pytest.raises(ValueError, match=match):
        as_data_and_mask(x, mask, model=keyword_eater)


def test_missing_values_need_a_model_that_takes_a_mask():
    x = torch.tensor([[1.0, float("nan")]])
    match = "x has 1 missing entries, but the model takes no keyword 'mask'"
    with pytest.raises(ValueError, match=match):
        as_data_and_mask(x, model=Bound().tutorial)


def test_rows_go_to_the_dtype_of_the_program():
    like = torch.zeros(1, dtype=torch.float64)
    assert as_rows(np.array([[1, 2]]), like, 2).dtype == torch.float64
    assert as_rows(torch.ones(2, 3), like).shape == (2, 3)


@pytest.mark.parametrize(("x", "width"), [(torch.ones(3), 3), (torch.ones(2, 4), 3)])
def test_rows_of_another_width_are_refused(x, width):
    with pytest.raises(ValueError, match=r"x must have shape \(rows, 3\) here; it has shape"):
        as_rows(x, torch.zeros(1), width)


def test_an_unknown_option_lists_the_known():
    assert check_option("kl", "auto", ("auto", "sampled")) == "auto"
    with pytest.raises(ValueError, match="kl must be one of 'auto', 'sampled'; got 'closed'"):
        check_option("kl", "closed", ("auto", "sampled"))


@pytest.mark.parametrize("bad", [0, -1, True])
def test_counts_are_whole_and_positive(bad):
    assert check_int("n", 3) == 3
    with pytest.raises(ValueError, match=f"n must be a whole number >= 1; got {bad}"):
        check_int("n", bad)
