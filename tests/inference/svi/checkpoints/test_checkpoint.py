"""Checkpoints: a resumed fit equals the uninterrupted one, and a bad file is rejected."""

import collections
import functools
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import oracles
import user_pairs
from ppl_vae.guides.guides import AmortizedGuide, PerDatumGuide
from ppl_vae.inference.svi.fit import fit_svi
from ppl_vae.likelihoods.gaussian import Gaussian
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.vae import VAE
from ppl_vae.networks.mlp_conv import mlp
from ppl_vae.objectives.bounds import ELBO, IWAE

N, D, K = 40, 6, 2


def simulate():
    return oracles.simulate_ppca((9.0, 4.0), 1.0, N, D, seed=0)


@pytest.fixture
def x():
    return simulate()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "runs" / "fit.pt"


class Killed(Exception):
    """Raised to interrupt a fit."""


def killed_at(step):
    """A cosine scheduler that raises after this number of steps."""

    class Killer(CosineAnnealingLR):
        def step(self, *arguments):
            super().step(*arguments)
            if self.last_epoch == step:
                raise Killed

    return Killer


# Fits of each kind


def jittered(x, generator):
    return x + 0.3 * torch.randn(x.shape, generator=generator, dtype=x.dtype)


def ppca_and_table(x):
    return PPCA.like(x, K, seed=0), PerDatumGuide(len(x), K).double()


def ppca_and_encoder(x):
    encoder = mlp(x.shape[1], 2 * K, (5,), seed=0)
    return PPCA.like(x, K, seed=0), AmortizedGuide(encoder, K).double()


def vae_with_dropout(x):
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(K, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, D))
    vae = VAE(
        decoder=decoder,
        encoder=mlp(D, 2 * K, (8,), seed=1),
        likelihood=Gaussian("shared"),
        data_dim=D,
        latent_dim=K,
    ).double()
    return vae, vae.guide


@dataclass(frozen=True)
class Case:
    make: object
    options: dict = field(default_factory=dict)
    validate: bool = False

    def fit(self, x, **more):
        """Fit a new pair; returns its parameters and the result."""
        model, guide = self.make(x)
        options = {"lr": 0.03, "seed": 5, "scheduler": CosineAnnealingLR} | self.options | more
        if self.validate:
            options["x_val"] = x[:9] + 0.3
        result = fit_svi(model.model, guide, x, **options)
        return [p.detach().clone() for p in (*model.parameters(), *guide.parameters())], result


CASES = {
    "whole data": Case(ppca_and_encoder, {"steps": 60}),
    "minibatches": Case(ppca_and_encoder, {"steps": 70, "batch_size": 15}),
    "per datum": Case(ppca_and_table, {"steps": 70, "batch_size": 15}),
    "dropout": Case(vae_with_dropout, {"epochs": 24, "batch_size": 15}),
    "validation": Case(vae_with_dropout, {"steps": 90, "batch_size": 15}, validate=True),
    "momentum": Case(
        ppca_and_table,
        {
            "steps": 70,
            "batch_size": 15,
            "optimizer": functools.partial(torch.optim.SGD, momentum=0.9),
            "lr": 0.01,
            "grad_clip": 1.0,
        },
    ),
    "warm-up": Case(ppca_and_encoder, {"steps": 70, "warmup": 60, "objective": ELBO(2, beta=2.0)}),
    "iwae": Case(ppca_and_encoder, {"steps": 60, "objective": IWAE(3)}),
    "score": Case(
        ppca_and_encoder,
        {"steps": 60, "warmup": 55, "objective": ELBO(2, gradient="score-loo"), "lr": 1e-3},
    ),
    "epoch transform": Case(
        ppca_and_encoder,
        {"steps": 70, "batch_size": 15, "epoch_transform": jittered},
        validate=True,
    ),
    "transform of whole data": Case(ppca_and_encoder, {"steps": 70, "epoch_transform": jittered}),
    "early stopping": Case(
        vae_with_dropout,
        # The number of planned steps could be worth compiling on a slow machine.
        {"steps": 3000, "batch_size": 8, "patience": 2, "lr": 0.2, "capture": False},
        validate=True,
    ),
}


def assert_equal_fits(first, second):
    """Parameters and results are equal bit for bit, except for times."""
    (values, result), (others, other) = first, second
    assert len(values) == len(others)
    for a, b in zip(values, others, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(result.objective, other.objective)
    assert (result.steps, result.stopped) == (other.steps, other.stopped)
    assert result.restored == other.restored
    assert (result.validation is None) == (other.validation is None)
    if result.validation is not None:
        assert torch.equal(result.validation, other.validation)
        assert torch.equal(result.validation_steps, other.validation_steps)


@functools.cache
def uninterrupted(name):
    """The fit of a case without a checkpoint, once for all tests."""
    return CASES[name].fit(simulate())


def interrupted(case, x, file, at):
    with pytest.raises(Killed):
        case.fit(x, checkpoint=file, scheduler=killed_at(at))


# Resuming


# The other cases differ in the objective or in details of those that run by default.
SLOW = {
    "whole data",
    "minibatches",
    "momentum",
    "iwae",
    "score",
    "transform of whole data",
    "early stopping",
}


@pytest.mark.parametrize(
    ("name", "at"),
    [
        *(
            pytest.param(name, 50, marks=pytest.mark.slow if name in SLOW else ())
            for name in CASES
        ),
        ("per datum", 28),
        pytest.param("validation", 53, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_fit_equals_the_uninterrupted_one(name, at, x, file):
    case = CASES[name]
    interrupted(case, x, file, at)
    written = file.stat()
    resumed = case.fit(x, checkpoint=file)
    assert file.stat().st_mtime_ns > written.st_mtime_ns
    assert_equal_fits(uninterrupted(name), resumed)
    assert resumed[1].elapsed.diff().min() >= 0
    assert float(resumed[1].elapsed[-1]) <= resumed[1].seconds


def test_a_resumed_fit_makes_only_the_remaining_steps(x, file):
    case, steps = CASES["minibatches"], collections.Counter()
    interrupted(case, x, file, 50)

    def counting(parameters, lr):
        optimizer = torch.optim.Adam(parameters, lr=lr, fused=True)
        optimizer.register_step_post_hook(lambda opt, *_: steps.update([id(opt)]))
        return optimizer

    case.fit(x, checkpoint=file, optimizer=counting)
    # Epochs have 3 steps, so checkpoints are written every 27; one step is made for a comparison.
    assert sorted(steps.values()) == [1, 70 - 27]


def test_a_fit_may_be_interrupted_several_times(x, file):
    case = CASES["validation"]
    for at in (20, 30, 60, 61, 85):
        interrupted(case, x, file, at)
    assert_equal_fits(uninterrupted("validation"), case.fit(x, checkpoint=file))


def test_a_checkpoint_does_not_change_the_fit(x, file):
    for name in ("validation", "per datum"):
        assert_equal_fits(uninterrupted(name), CASES[name].fit(x, checkpoint=file))
        file.unlink()


@pytest.mark.parametrize("name", ["minibatches", "early stopping"])
def test_a_completed_fit_is_not_continued(name, x, file):
    case = CASES[name]
    done = case.fit(x, checkpoint=file)
    content = file.read_bytes()
    assert_equal_fits(done, case.fit(x, checkpoint=file))
    assert file.read_bytes() == content


def test_without_a_seed_the_states_of_the_generators_are_resumed(x, file):
    case = CASES["dropout"]

    def seed_all(seed):
        for generator in (torch.manual_seed, np.random.seed, random.seed):
            generator(seed)

    def draws():
        return torch.rand(()).item(), np.random.rand(), random.random()

    seed_all(3)
    whole = case.fit(x, seed=None)
    after = draws()
    seed_all(3)
    with pytest.raises(Killed):
        case.fit(x, seed=None, checkpoint=file, scheduler=killed_at(50))
    seed_all(99)
    assert_equal_fits(whole, case.fit(x, seed=None, checkpoint=file))
    assert draws() == after


def test_with_a_seed_resuming_does_not_change_the_global_generators(x, file):
    case = CASES["dropout"]
    interrupted(case, x, file, 50)
    before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    case.fit(x, checkpoint=file)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (str(np.random.get_state()), random.getstate())


@pytest.mark.parametrize("name", ["param_only", "regularized", "plain_object"])
def test_external_pairs_are_resumed(name, file, float64):
    def fit(scheduler=CosineAnnealingLR, **options):
        pyro.clear_param_store()
        model, guide, x = user_pairs.PAIRS[name]()
        options |= {"scheduler": scheduler, "batch_size": 7, "lr": 0.02, "seed": 0}
        result = fit_svi(model, guide, x, steps=60, **options)
        tensors = list(pyro.get_param_store().values())
        if name == "regularized":
            tensors += model.__self__.state_dict().values()
        if name == "plain_object":
            tensors += [p for net in model.__self__.networks.values() for p in net.parameters()]
        return [tensor.detach().clone() for tensor in tensors], result

    with pytest.raises(Killed):
        fit(killed_at(45), checkpoint=file)
    whole = fit()
    assert whole[0]
    assert_equal_fits(whole, fit(checkpoint=file))


# Longer than before


def stepped(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 20, 0.7)


DEFAULT = ("per datum", "epoch transform")
LONGER = [
    pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow)
    for name in CASES
    if name != "early stopping"
]


@pytest.mark.parametrize("name", LONGER)
def test_a_completed_fit_continued_equals_one_long_fit(name, x, file):
    """From an end at a regular evaluation (54 steps), at another step (70), or before any (10)."""
    case, options = CASES[name], {"scheduler": stepped, "epochs": None}
    whole = case.fit(x, steps=80, **options)
    for steps in (10, 54, 70):
        case.fit(x, steps=steps, checkpoint=file, **options)
        assert_equal_fits(whole, case.fit(x, steps=80, checkpoint=file, **options))
        file.unlink()


def test_a_fit_may_be_continued_several_times(x, file):
    case = Case(vae_with_dropout, {"batch_size": 13, "scheduler": None}, validate=True)
    for epochs in (3, 9, 10):
        last = case.fit(x, epochs=epochs, checkpoint=file)
        assert last[1].steps == 3 * epochs
        assert_equal_fits(case.fit(x, epochs=epochs), last)


def test_an_interrupted_fit_may_be_resumed_with_more_steps(x, file):
    case = CASES["minibatches"]
    with pytest.raises(Killed):
        case.fit(x, scheduler=killed_after(50), checkpoint=file)
    options = {"scheduler": stepped, "steps": 90}
    assert_equal_fits(case.fit(x, **options), case.fit(x, checkpoint=file, **options))


def killed_after(step):
    """The scheduler ``stepped``, which raises after this number of steps."""

    class Killer(torch.optim.lr_scheduler.StepLR):
        def __init__(self, optimizer):
            super().__init__(optimizer, 20, 0.7)

        def step(self, *arguments):
            super().step(*arguments)
            if self.last_epoch == step:
                raise Killed

    return Killer


SCHEDULERS = {
    "cosine": CosineAnnealingLR,
    "linear": lambda optimizer, steps: torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1 - step / (steps + 1)
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_another_schedule_is_rejected(name, x, file):
    case = CASES["minibatches"]
    case.fit(x, scheduler=SCHEDULERS[name], checkpoint=file)
    content = file.read_bytes()
    message = (
        "its schedule is of 70 steps, here it is of 110, with which the learning rate of step 2 "
        "is .* instead of .*scheduler of .optimizer. alone"
    )
    with pytest.raises(ValueError, match=message):
        case.fit(x, steps=110, scheduler=SCHEDULERS[name], checkpoint=file)
    assert file.read_bytes() == content


def test_a_scheduler_with_equal_learning_rates_is_accepted(x, file):
    """Its rates do not depend on the number of steps that it is given."""

    def fixed_cosine(optimizer, steps):
        del steps
        return CosineAnnealingLR(optimizer, 200)

    case = CASES["minibatches"]
    case.fit(x, scheduler=fixed_cosine, checkpoint=file)
    longer = case.fit(x, steps=90, scheduler=fixed_cosine, checkpoint=file)
    assert_equal_fits(case.fit(x, steps=90, scheduler=fixed_cosine), longer)


def test_another_scheduler_is_rejected(x, file):
    def other(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, 30, 0.7)

    case = CASES["minibatches"]
    case.fit(x, scheduler=stepped, checkpoint=file)
    with pytest.raises(ValueError, match=r"rate of step 21 is 0\.03 instead of 0\.021"):
        case.fit(x, steps=90, scheduler=other, checkpoint=file)


def test_fewer_steps_than_made_are_rejected(x, file):
    case = CASES["minibatches"]
    case.fit(x, scheduler=stepped, checkpoint=file)
    message = "has made 70 steps, more than the 60 requested, and steps cannot be undone"
    with pytest.raises(ValueError, match=message):
        case.fit(x, steps=60, scheduler=stepped, checkpoint=file)


@pytest.mark.slow
def test_a_fit_stopped_early_continues_without_patience(x, file):
    options = {"scheduler": None, "steps": 3000}
    case = CASES["early stopping"]
    stopped = case.fit(x, checkpoint=file, **options)
    assert "early at step" in stopped[1].stopped and stopped[1].steps < 1000
    assert_equal_fits(stopped, case.fit(x, checkpoint=file, scheduler=None, steps=4000))
    more = stopped[1].steps + 60
    longer = case.fit(x, checkpoint=file, scheduler=None, steps=more, patience=None)
    assert longer[1].steps == more
    assert_equal_fits(case.fit(x, scheduler=None, steps=more, patience=None), longer)


def test_a_fit_with_remaining_rows_is_continued(x, file):
    for drop_last in (False, True):
        options = {"scheduler": None, "batch_size": 13, "drop_last": drop_last}
        case = Case(ppca_and_table, options)
        whole = case.fit(x, epochs=30)
        case.fit(x, epochs=11, checkpoint=file)
        assert_equal_fits(whole, case.fit(x, epochs=30, checkpoint=file))
        with pytest.raises(ValueError, match="its schedule is"):
            case.fit(x, epochs=40, drop_last=not drop_last, checkpoint=file)
        file.unlink()


@pytest.mark.slow
def test_a_captured_fit_is_continued_captured(x, file, uncompiled):
    """Steps that the shorter fit ran eagerly at its end are repeated as captured steps."""
    case = Case(ppca_and_encoder, {"scheduler": None, "batch_size": 10, "capture": True})
    whole = case.fit(x, steps=69)
    shorter = case.fit(x, steps=43, checkpoint=file)
    longer = case.fit(x, steps=69, checkpoint=file)
    assert_equal_fits(whole, longer)
    assert shorter[1].execution.startswith("compiled, 7 steps per call: as requested")
    assert longer[1].execution.startswith("compiled, 7 steps per call: as requested")


def test_the_execution_is_kept_unless_another_is_requested(x, file, uncompiled):
    case = Case(ppca_and_encoder, {"scheduler": None, "batch_size": 10})
    assert "too little to pay" in case.fit(x, steps=30, checkpoint=file)[1].execution
    kept = case.fit(x, steps=40, checkpoint=file)[1].execution
    assert kept.startswith("eager: as before the checkpoint: about ")
    recorded = case.fit(x, steps=100, checkpoint=file, capture="recorded")[1].execution
    assert recorded == "recorded: as requested"
    again = case.fit(x, steps=110, checkpoint=file)[1].execution
    assert again == "recorded: as before the checkpoint"
    requested = case.fit(x, steps=120, checkpoint=file, capture=True)[1].execution
    assert requested.startswith("compiled") and requested.endswith("as requested")


# Files of other fits


def test_only_the_checkpoint_is_written(x, file):
    CASES["minibatches"].fit(x, checkpoint=str(file))
    assert [path.name for path in file.parent.iterdir()] == ["fit.pt"]


OTHERS = {
    "model": (Case(vae_with_dropout, {"steps": 70, "batch_size": 15}), "model"),
    "steps": (Case(ppca_and_table, {"steps": 71, "batch_size": 15}), "schedule"),
    "batch": (Case(ppca_and_table, {"steps": 70, "batch_size": 14}), "schedule"),
    "optimizer": (
        Case(ppca_and_table, {"steps": 70, "batch_size": 15, "optimizer": torch.optim.AdamW}),
        "optimizer",
    ),
    "objective": (
        Case(ppca_and_table, {"steps": 70, "batch_size": 15, "objective": ELBO(beta=2.0)}),
        "objective",
    ),
    "warm-up": (Case(ppca_and_table, {"steps": 70, "batch_size": 15, "warmup": 5}), "objective"),
    "rate": (Case(ppca_and_table, {"steps": 70, "batch_size": 15, "lr": 0.01}), "lr"),
    "clipping": (
        Case(ppca_and_table, {"steps": 70, "batch_size": 15, "grad_clip": 1.0}),
        "grad_clip",
    ),
    "scheduler": (
        Case(ppca_and_table, {"steps": 70, "batch_size": 15, "scheduler": None}),
        "scheduler",
    ),
}


@pytest.fixture(scope="module")
def per_datum_content(tmp_path_factory):
    """The bytes of a checkpoint of the case "per datum"."""
    file = tmp_path_factory.mktemp("per_datum") / "fit.pt"
    interrupted(CASES["per datum"], simulate(), file, 50)
    return file.read_bytes()


@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_another_fit_is_rejected(name, x, file, per_datum_content):
    content = per_datum_content
    file.parent.mkdir()
    file.write_bytes(content)
    other, key = OTHERS[name]
    message = f"checkpoint .*fit.pt is of another fit: its {key} is .*, here it is"
    with pytest.raises(ValueError, match=message):
        other.fit(x, checkpoint=file)
    assert file.read_bytes() == content


def test_a_checkpoint_of_other_data_is_rejected(x, file):
    case = CASES["minibatches"]
    interrupted(case, x, file, 50)
    with pytest.raises(ValueError, match="is of another fit: its schedule is"):
        case.fit(x[:-1], checkpoint=file)


def test_a_rejected_checkpoint_does_not_change_the_pair(x, file, per_datum_content):
    file.parent.mkdir()
    file.write_bytes(per_datum_content)
    ppca, guide = ppca_and_encoder(x)
    before = [p.detach().clone() for p in (*ppca.parameters(), *guide.parameters())]
    with pytest.raises(ValueError, match="of another fit"):
        fit_svi(ppca.model, guide, x, steps=70, batch_size=15, checkpoint=file)
    after = (*ppca.parameters(), *guide.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.fixture(scope="module")
def good_content(tmp_path_factory):
    """The bytes of a checkpoint of the case "minibatches"."""
    file = tmp_path_factory.mktemp("good") / "fit.pt"
    interrupted(CASES["minibatches"], simulate(), file, 50)
    return file.read_bytes()


@pytest.fixture
def content(good_content, file):
    """Those bytes, in the file."""
    file.parent.mkdir()
    file.write_bytes(good_content)
    return good_content


def assert_rejected(x, file):
    with pytest.raises(ValueError, match=r"checkpoint .*fit.pt cannot be read.*Delete it"):
        CASES["minibatches"].fit(x, checkpoint=file)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_rejected(share, x, file, content):
    file.write_bytes(content[: int(share * len(content))])
    assert_rejected(x, file)


@pytest.mark.parametrize("seed", range(16))
def test_a_tampered_file_is_rejected(seed, x, file, content):
    """One bit, anywhere."""
    rng, tampered = np.random.default_rng(seed), bytearray(content)
    tampered[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    file.write_bytes(bytes(tampered))
    assert_rejected(x, file)


@pytest.mark.parametrize(
    "other",
    [{"a": 1}, [1, 2], "text", None, torch.zeros(3), torch.tensor(1.0), {"fingerprint": 3}],
    ids=repr,
)
def test_a_file_of_other_content_is_rejected(other, x, file):
    file.parent.mkdir()
    torch.save(other, file)
    assert_rejected(x, file)


def test_text_is_rejected(x, file):
    file.parent.mkdir()
    file.write_text("hello")
    assert_rejected(x, file)


def test_a_folder_is_rejected(x, file):
    file.mkdir(parents=True)
    assert_rejected(x, file)


class Executed:
    """Unpickling it calls a function."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def plain_pickle(value, path):
    path.write_bytes(pickle.dumps(value, protocol=2))


@pytest.mark.parametrize("write", [torch.save, plain_pickle])
def test_reading_executes_no_code(write, x, file, tmp_path):
    file.parent.mkdir()
    write({"fingerprint": Executed(tmp_path / "executed")}, file)
    assert_rejected(x, file)
    assert not (tmp_path / "executed").exists()


# Atomic writing


def half_a_file(value, file):
    file.write(b"half")
    failing()


def failing(*_):
    raise OSError("no space left on device")


@pytest.mark.parametrize(
    ("owner", "name", "failure"),
    [(torch, "save", half_a_file), (os, "fsync", failing), (Path, "replace", failing)],
    ids=["save", "fsync", "replace"],
)
def test_a_failure_while_writing_keeps_the_old_file(
    owner, name, failure, x, file, content, monkeypatch
):
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, failure)
        with pytest.raises(OSError, match="no space left on device"):
            CASES["minibatches"].fit(x, checkpoint=file)
    assert file.read_bytes() == content
    assert [path.name for path in file.parent.iterdir()] == ["fit.pt"]
    resumed = CASES["minibatches"].fit(x, checkpoint=file)
    assert_equal_fits(uninterrupted("minibatches"), resumed)


def test_a_failure_of_the_first_write_leaves_no_file(x, file, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", half_a_file)
        with pytest.raises(OSError, match="no space left on device"):
            CASES["minibatches"].fit(x, checkpoint=file)
    assert not file.parent.exists() or list(file.parent.iterdir()) == []


SCRIPT = """
import sys
import test_checkpoint
test_checkpoint.LONG.fit(test_checkpoint.simulate(), checkpoint=sys.argv[1])
"""
LONG = Case(ppca_and_table, {"steps": 4000, "batch_size": 15})


@pytest.mark.slow
def test_a_killed_process_leaves_a_complete_checkpoint(x, file):
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    for wait in (0.5, 0.87, 1.31):
        written = file.stat().st_mtime_ns if file.exists() else 0
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(file)], env=os.environ | {"PYTHONPATH": paths}
        )
        while not file.exists() or file.stat().st_mtime_ns == written:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert_equal_fits(LONG.fit(x), LONG.fit(x, checkpoint=file))
