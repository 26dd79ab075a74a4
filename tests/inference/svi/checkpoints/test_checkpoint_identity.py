"""A checkpoint is resumed by the fit that wrote it alone: what differs is named."""

import contextlib
import functools
import hashlib
import io
import itertools
import os
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, StepLR

import oracles
from killed import replaced
from ppl_vae.core.errors import CheckpointError
from ppl_vae.inference.svi.checkpoints.checkpoint import DIGEST_SIZE
from ppl_vae.inference.svi.fit import fit_svi
from ppl_vae.likelihoods.gaussian import Gaussian, OptimalGaussian
from ppl_vae.models.vae import VAE
from ppl_vae.networks.mlp_conv import FixedScaleEncoder, mlp
from ppl_vae.objectives.bounds import ELBO, IWAE

N, D, K = 24, 4, 2
X = oracles.simulate_ppca((4.0, 2.0), 1.0, N, D, seed=0)


class Layer(nn.Module):
    """A layer of a user, with a setting and a function of its own."""

    def __init__(self, slope=0.1, function=torch.tanh):
        super().__init__()
        self.linear = nn.Linear(K, D)
        self.slope, self.function = slope, function

    def forward(self, z):
        return self.function(self.linear(z)) + self.slope * z.sum(-1, keepdim=True)


class OtherLayer(Layer):
    def forward(self, z):
        return self.function(self.linear(z)) + self.slope * z.mean(-1, keepdim=True)


OtherLayer.__name__ = "Layer"


def vae(decoder=None, encoder=None, likelihood=None):
    torch.manual_seed(0)
    return VAE(
        decoder=decoder or mlp(K, D, (3,), seed=0),
        encoder=encoder or mlp(D, 2 * K, (3,), seed=1),
        likelihood=likelihood or Gaussian("shared"),
        data_dim=D,
        latent_dim=K,
    ).double()


def frozen(seed):
    torch.manual_seed(seed)
    decoder = mlp(K, D, (3,), seed=seed)
    decoder[0].requires_grad_(False)
    return decoder


def fit(path, x=X, steps=27, make=vae, **options):
    model = make()
    options = {"lr": 0.01, "seed": 3, "capture": False, "progress": False, **options}
    result = fit_svi(model.model, model.guide, x, steps=steps, checkpoint=path, **options)
    return model, result


def moved(x, row=0):
    x = x.copy()
    x[row, 1] += 1e-9
    return x


def missing(x, row=0):
    x = x.copy()
    x[row, 1] = np.nan
    return x


def shifted(x, generator, by=0.1):
    return x + by * torch.randn(x.shape, generator=generator, dtype=x.dtype)


def decayed(weight_decay, betas=(0.9, 0.999)):
    return functools.partial(torch.optim.Adam, weight_decay=weight_decay, betas=betas)


def stepped(gamma, size=10):
    return functools.partial(StepLR, step_size=size, gamma=gamma)


def falling(factor):
    def scheduler(optimizer):
        return LambdaLR(optimizer, lambda step: factor**step)

    return scheduler


def with_layer(layer):
    return lambda: vae(decoder=layer())


def with_activation(activation):
    return lambda: VAE.mlp(D, K, hidden=(3,), activation=activation, seed=0).double()


def with_encoder(heads=None, scale=None):
    def make():
        torch.manual_seed(0)
        if heads is None:
            return vae(encoder=FixedScaleEncoder(mlp(D, K, (3,), seed=1), scale))
        layer = nn.TransformerEncoderLayer(4, heads, 4, 0.0, batch_first=True)
        return vae(encoder=nn.Sequential(layer, nn.Linear(D, 2 * K)))

    return make


def with_floor(floor):
    return lambda: vae(likelihood=Gaussian("shared", floor=floor))


DIFFERENCES = {
    # name: (options of the first fit, those of the second, what is named)
    "data": ({}, {"x": moved(X)}, "x is 24 x 4, float64"),
    "order of rows": ({}, {"x": X[::-1].copy()}, "x is"),
    "mask": ({"x": missing(X)}, {"x": missing(X, 1)}, "x is"),
    "mask alone": (
        {"mask": np.arange(N * D).reshape(N, D) != 5},
        {"mask": np.arange(N * D).reshape(N, D) != 9},
        "x is",
    ),
    "mask of zeros": (
        {"x": np.zeros((N, D)), "mask": np.arange(N * D).reshape(N, D) != 5},
        {"x": np.zeros((N, D)), "mask": np.arange(N * D).reshape(N, D) != 9},
        "mask is 24 x 4, bool",
    ),
    "no mask": ({"x": missing(X)}, {"x": X}, "x is"),
    "validation rows": ({"x_val": X[:3]}, {"x_val": X[1:4]}, "x_val is 3 x 4"),
    "no validation rows": ({"x_val": X[:3]}, {"x_val": None}, "x_val is"),
    "new validation rows": ({}, {"x_val": X[:3]}, "x_val is None"),
    "seed": ({}, {"seed": 4}, "seed is 3, here it is 4"),
    "no seed": ({}, {"seed": None}, "seed is 3, here it is None"),
    "precision": ({}, {"precision": "bf16"}, "precision is float32, here it is bf16"),
    "learning rate": ({}, {"lr": 0.02}, r"lr is 0\.01, here it is 0\.02"),
    "clipping": ({"grad_clip": 1.0}, {"grad_clip": 2.0}, "grad_clip"),
    "optimizer": ({}, {"optimizer": torch.optim.AdamW}, "optimizer is Adam, here it is AdamW"),
    "weight decay": (
        {"optimizer": decayed(0.1)},
        {"optimizer": decayed(0.2)},
        "optimizer's weight_decay is 0.1, here it is 0.2",
    ),
    "momentum": (
        {"optimizer": decayed(0.0)},
        {"optimizer": decayed(0.0, (0.8, 0.999))},
        "optimizer's betas",
    ),
    "scheduler": (
        {"scheduler": stepped(0.5)},
        {"scheduler": stepped(0.6)},
        r"scheduler is another one: the learning rate of step 11 is 0\.006 instead of 0\.005",
    ),
    "later scheduler": (
        {"scheduler": stepped(0.5, 100)},
        {"scheduler": stepped(0.5, 200)},
        "scheduler is another one: its step_size is 100 instead of 200",
    ),
    "function of the scheduler": (
        {"scheduler": falling(0.9)},
        {"scheduler": falling(0.8)},
        "scheduler is another one: the learning rate of step 2",
    ),
    "objective": ({"objective": IWAE(2)}, {"objective": IWAE(3)}, "objective"),
    "beta": ({}, {"objective": ELBO(beta=2.0)}, "objective"),
    "objective of Pyro": (
        {"objective": Trace_ELBO(num_particles=2)},
        {"objective": Trace_ELBO(num_particles=3)},
        "objective is .*num_particles=2.*here it is .*num_particles=3",
    ),
    "batch size": ({"batch_size": 8}, {"batch_size": 6}, "schedule"),
    "transform": (
        {"epoch_transform": functools.partial(shifted, by=0.1)},
        {"epoch_transform": functools.partial(shifted, by=0.2)},
        r"epoch_transform is shifted.*by=0\.1.*by=0\.2",
    ),
    "activation": (
        {"make": with_activation("relu")},
        {"make": with_activation("tanh")},
        "network VAE is .*relu.*here it is .*tanh",
    ),
    "activation of a user's network": (
        {"make": with_layer(lambda: nn.Sequential(nn.Linear(K, D), nn.ReLU()))},
        {"make": with_layer(lambda: nn.Sequential(nn.Linear(K, D), nn.Tanh()))},
        r"network VAE\.decoder\.1 is ReLU.*, here it is Tanh\(\)",
    ),
    "dropout": (
        {"make": with_layer(lambda: nn.Sequential(nn.Dropout(0.1), nn.Linear(K, D)))},
        {"make": with_layer(lambda: nn.Sequential(nn.Dropout(0.2), nn.Linear(K, D)))},
        r"network VAE\.decoder\.0 is Dropout\(p=0\.1",
    ),
    "setting of a user's layer": (
        {"make": with_layer(Layer)},
        {"make": with_layer(lambda: Layer(0.2))},
        r"network VAE\.decoder is Layer.*slope=0\.1.*slope=0\.2",
    ),
    "function of a user's layer": (
        {"make": with_layer(Layer)},
        {"make": with_layer(lambda: Layer(function=torch.sigmoid))},
        r"network VAE\.decoder is Layer.*function=.*tanh",
    ),
    "code of a user's layer": (
        {"make": with_layer(Layer)},
        {"make": with_layer(OtherLayer)},
        r"network VAE\.decoder is Layer",
    ),
    "likelihood": (
        {"make": with_floor(1e-3)},
        {"make": with_floor(1e-2)},
        r"network VAE is .*floor=0\.001.*here it is .*floor=0\.01",
    ),
    "heads of a transformer": (
        {"make": with_encoder(heads=1)},
        {"make": with_encoder(heads=2)},
        r"network VAE\.guide\.encoder.*num_heads=1.*num_heads=2",
    ),
    "scale of an encoder": (
        {"make": with_encoder(scale=0.3)},
        {"make": with_encoder(scale=0.4)},
        r"network VAE\.guide\.encoder is FixedScaleEncoder.*scale=0\.3.*scale=0\.4",
    ),
    "frozen parameters": (
        {"make": with_layer(lambda: frozen(1))},
        {"make": with_layer(lambda: frozen(2))},
        "frozen parameters",
    ),
    "dtype": ({}, {"make": lambda: vae().float()}, "model is .*float64.*float32"),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_what_differs_is_named_and_refused(name, tmp_path):
    first, second, named = DIFFERENCES[name]
    file = tmp_path / "fit.pt"
    fit(file, **first)
    content = file.read_bytes()
    made = []

    def remembered():
        made.append(second.get("make", first.get("make", vae))())
        return made[0]

    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    message = rf"checkpoint .*fit\.pt is of another fit: its {named}"
    with pytest.raises(CheckpointError, match=message):
        fit(file, **{**first, **second, "make": remembered})
    assert file.read_bytes() == content
    if second.get("seed", 3) is not None:
        after = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
        assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    untouched = second.get("make", first.get("make", vae))()
    for a, b in zip(untouched.parameters(), made[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_finished_fit_is_resumed_with_a_note_by_the_same_fit_alone(tmp_path):
    file = tmp_path / "fit.pt"
    model, _ = fit(file)
    again, result = fit(file)
    assert f"resumed from {file} after 27 steps" in result.notes
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(CheckpointError, match="its x is"):
        fit(file, x=X + 1.0)


def test_long_descriptions_are_shown_where_they_differ(tmp_path):
    file = tmp_path / "fit.pt"

    def deep(last):
        return lambda: VAE.mlp(D, K, hidden=(*(3,) * 50, last, *(3,) * 50), seed=0).double()

    fit(file, steps=1, make=deep(3))
    message = r"its model is \.\.\..*\[3, 3\].*, here it is \.\.\..*\[4, 3\].*\.\.\.\. Pass"
    with pytest.raises(CheckpointError, match=message) as caught:
        fit(file, steps=1, make=deep(4))
    assert len(str(caught.value)) < 800


def closure_pair(scale):
    decoder, encoder = nn.Linear(K, D).double(), nn.Linear(D, K).double()

    def model(x, index=None, num_data=None):
        pyro.module("decoder", decoder)
        with pyro.plate("data", num_data or len(x), subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), K).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), scale).to_event(1), obs=x)

    def guide(x, index=None, num_data=None):
        pyro.module("encoder", encoder)
        with pyro.plate("data", num_data or len(x), subsample=torch.arange(len(x))):
            pyro.sample("z", dist.Normal(encoder(x), 0.5).to_event(1))

    return model, guide


def test_a_number_in_the_program_of_a_user_belongs_to_the_fit(tmp_path):
    options = {"steps": 27, "capture": False, "seed": 0, "checkpoint": tmp_path / "fit.pt"}
    fit_svi(*closure_pair(1.0), X, **options)
    pyro.clear_param_store()
    fit_svi(*closure_pair(1.0), X, **options)
    pyro.clear_param_store()
    with pytest.raises(CheckpointError, match=r"its model's program is .*model.*scale=1"):
        fit_svi(*closure_pair(2.0), X, **options)


def test_a_refused_checkpoint_leaves_the_scale_frozen(tmp_path):
    file = tmp_path / "fit.pt"
    model, _ = fit(file, make=lambda: vae(likelihood=OptimalGaussian()))
    scale = model.likelihood.scale.clone()
    with pytest.raises(CheckpointError, match="its seed is"):
        fit(file, make=lambda: model, seed=4)
    assert torch.equal(model.likelihood.scale, scale) and scale.isfinite()
    again, _ = fit(file, make=lambda: model)  # the same object is resumed, too
    assert torch.equal(again.likelihood.scale, scale)


def test_a_scheduler_that_changes_momentum_is_resumed(tmp_path):
    def one_cycle(optimizer):
        return OneCycleLR(optimizer, 0.1, total_steps=60)

    whole, _ = fit(tmp_path / "whole.pt", steps=54, scheduler=one_cycle)
    fit(tmp_path / "fit.pt", steps=27, scheduler=one_cycle)
    longer, _ = fit(tmp_path / "fit.pt", steps=54, scheduler=one_cycle)
    for a, b in zip(whole.parameters(), longer.parameters(), strict=True):
        assert torch.equal(a, b)


def test_ends_between_evaluations_in_succession_are_continued_from_a_regular_one(tmp_path):
    options = {"x_val": X[:5]}
    whole, result = fit(tmp_path / "whole.pt", steps=60, **options)
    for steps in (30, 33, 60):
        last, other = fit(tmp_path / "fit.pt", steps=steps, **options)
    for a, b in zip(whole.parameters(), last.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(result.validation, other.validation)


def test_a_learning_rate_of_numpy_is_resumed(tmp_path):
    file = tmp_path / "fit.pt"
    fit(file, lr=np.float64(0.01))
    assert "resumed" in fit(file, lr=np.float32(0.01).item() * 0 + 0.01)[1].notes[-1]


# Hostile files: any content under a right checksum


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The bytes of a checkpoint with validation rows, a scheduler and a further end."""
    file = tmp_path_factory.mktemp("good") / "fit.pt"
    fit(file, **HOSTILE)
    return file.read_bytes()


HOSTILE = {"steps": 30, "x_val": X[:3], "scheduler": stepped(0.5)}


def parsed(data):
    return torch.load(io.BytesIO(data[DIGEST_SIZE:]), weights_only=True)


def sealed(data):
    return hashlib.sha256(data).digest() + data


def unparsed(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return sealed(buffer.getvalue())


WRONG = [None, True, -1, 10**20, 0.5, float("nan"), "text", [], [1], [[]], {}, {"a": 1}]
WRONG += [torch.zeros(3), torch.tensor(torch.nan), [torch.zeros(2)], {0: torch.zeros(2)}]


def is_refused(file, data, expected=None):
    """Whether the file is refused, by its name; otherwise the fit must be the expected one."""
    file.write_bytes(data)
    vae()  # which sets the seed, as it does in the fit
    generators = torch.get_rng_state()
    try:
        model, _ = fit(file, **HOSTILE)
    except CheckpointError as error:
        assert str(file) in str(error)
        assert file.read_bytes() == data
        return True
    finally:
        assert torch.equal(torch.get_rng_state(), generators)
    if expected is not None:
        for a, b in zip(model.parameters(), expected, strict=True):
            assert torch.equal(a, b)
    return False


def keys_of(content):
    """Paths to the entries of a checkpoint, and to those inside some of them."""
    yield from ((key,) for key in content)
    for outer in ("optimizer", "scheduler", "generators", "before_end", "fingerprint"):
        yield from ((outer, key) for key in content[outer])
    for number in range(3):
        yield ("validation", number)
        yield ("optimizer", "state", number)
        yield ("optimizer", "state", number, "exp_avg")
        yield ("optimizer", "state", number, "step")
        yield ("state", number)
        yield ("best", number)
    yield from (("capture", 0), ("capture", 1), ("values", 3), ("elapsed", 0), ("past_rates", 2))
    for key in content["optimizer"]["param_groups"][0]:
        yield ("optimizer", "param_groups", 0, key)
    for number in range(5):
        yield ("generators", "numpy", number)
    for number in range(3):
        yield ("generators", "python", number)


def count_refused(file, content, step):
    """The share of wrong values that are refused: each at each entry, or every ``step``-th."""
    expected = list(fit(None, **HOSTILE)[0].parameters())
    changes = [*itertools.product(keys_of(content), WRONG)][::step]
    refused = [
        is_refused(file, unparsed(replaced(content, path, wrong)), expected)
        for path, wrong in changes
    ]
    assert len(refused) > 12
    return sum(refused) / len(refused)


def test_an_entry_of_the_wrong_type_is_refused(good, tmp_path):
    content = parsed(good)
    assert count_refused(tmp_path / "fit.pt", content, 73) > 0.8
    for key in content:
        data = unparsed({k: value for k, value in content.items() if k != key})
        assert is_refused(tmp_path / "fit.pt", data)


@pytest.mark.slow
def test_every_entry_with_every_wrong_value_is_refused(good, tmp_path):
    assert count_refused(tmp_path / "fit.pt", parsed(good), 1) > 0.8


OTHERS = [{"a": 1}, [1, 2], "text", None, torch.zeros(3), {"fingerprint": 3}, {"fingerprint": {}}]


@pytest.mark.parametrize("other", OTHERS, ids=repr)
def test_another_content_is_refused(other, tmp_path):
    assert is_refused(tmp_path / "fit.pt", unparsed(other))


@pytest.mark.parametrize("seed", range(12))
def test_damage_under_a_right_checksum_ends_in_no_other_error(seed, good, tmp_path):
    """A truncated file is refused; a change inside a number of a tensor cannot be noticed."""
    rng, data = random.Random(seed), bytearray(good[DIGEST_SIZE:])
    for _ in range(rng.choice([1, 1, 20])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    if seed % 3 == 0:
        data = data[: rng.randrange(len(data))]
    refused = False
    with contextlib.suppress(FloatingPointError):  # of a loss that diverges
        refused = is_refused(tmp_path / "fit.pt", sealed(bytes(data)))
    assert refused or seed % 3


def test_what_is_no_file_is_refused(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("loop", "pipe", "folder"):
        with pytest.raises(CheckpointError, match=rf"{name}.* is not a regular file"):
            fit(tmp_path / name)
