"""The pretended accelerator: its numbers, its rules, and where the host waits for it."""

import copy

import pyro
import pytest
import torch
from torch import nn

import oracles
import pretend_device
from ppl_vae import (
    ELBO,
    IWAE,
    PPCA,
    VAE,
    Autoencoder,
    ExactGuide,
    collapse,
    elbo,
    fit_closed_form,
    fit_em,
    fit_svi,
    gaps,
    log_likelihood,
)
from ppl_vae.core.devices.accelerators import automatic_device, current_accelerator
from ppl_vae.evaluation import Annealing, subspace
from ppl_vae.inference import fit_pca
from ppl_vae.inference.svi.trainer import READ_INTERVAL
from pretend_device import PretendTensor, count_waits, pretended_device

D, K, N = 6, 2, 40

pretend_device.register()
pytestmark = pytest.mark.skipif(
    bool(pretend_device.STATE.unsupported), reason=pretend_device.STATE.unsupported
)


@pytest.fixture
def device():
    with pretended_device() as made:
        yield made


def data(missing=0.0):
    x = oracles.simulate_ppca((4, 2), 1, N, D, seed=0)
    if missing:
        x = oracles.with_missing_values(x, missing, seed=1)
    return torch.from_numpy(x)


def vae(device="cpu"):
    return VAE.mlp(D, K, hidden=(8,), seed=0).double().to(device)


# The rules of a GPU


def test_numbers_are_those_of_the_cpu(device):
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    w = nn.Linear(3, 2)
    moved = copy.deepcopy(w).to(device)
    for module, rows in ((w, x), (moved, x.to(device))):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            module(rows).square().mean().backward()
            optimizer.step()
    assert all(isinstance(p, PretendTensor) and p.device == device for p in moved.parameters())
    for here, there in zip(w.parameters(), moved.parameters(), strict=True):
        assert torch.equal(here, there.cpu())


def test_devices_are_not_mixed(device):
    x = torch.ones(3, device=device)
    with pytest.raises(RuntimeError, match="at least two devices, gpu:0 and cpu"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError, match=r"at least two devices.*aten.stack"):
        torch.stack([x.sum(), torch.ones(())])
    with pytest.raises(TypeError, match="can't convert gpu:0 device type tensor to numpy"):
        x.numpy()
    with pytest.raises(RuntimeError, match="Expected a 'gpu' device type for generator"):
        torch.randn(3, device=device, generator=torch.Generator())
    # What CUDA takes: numbers of the CPU, and indices.
    assert (x * torch.tensor(2.0))[torch.tensor([0, 2])].tolist() == [2, 2]
    assert torch.randn(3, device=device, generator=torch.Generator(device)).device == device


def test_the_device_is_there_inside_the_block_only(device):
    assert current_accelerator() == device == automatic_device([torch.ones(1)])
    with pretended_device():
        pass
    assert torch.accelerator.is_available()


def test_without_the_block_there_is_no_accelerator():
    assert not torch.accelerator.is_available()
    assert automatic_device([]).type == "cpu"


def test_waits_are_counted_by_line(device):
    x = torch.ones(3, device=device)
    with count_waits() as waits:
        float(x[0])
        x[x > 0]
        torch.tensor([1.0, 2.0], device=device)
        x.to("cpu")
        torch.ones(3).pin_memory().to(device, non_blocking=True)
        x + 1
    assert sorted((w.kind, w.operation) for w in waits) == [
        ("read", "aten._local_scalar_dense"),
        ("read", "aten._to_copy"),
        ("read", "aten.index"),
        ("write", "aten.copy_"),
    ]
    assert {w.place.split(":")[0] for w in waits} == {"tests/test_pretend_device.py"}


# Entry points on the device: the CPU's bits


def parameters(module):
    return [p.detach().cpu() for p in module.parameters()]


def svi(x, objective=None, **options):
    pair = vae(x.device)
    options |= {"objective": objective or ELBO(), "steps": 6, "batch_size": 16, "seed": 0}
    fit = fit_svi(pair.model, pair.guide, x, **options)
    return [fit.objective, *parameters(pair)]


def exact(x):
    ppca = PPCA.like(x, K, seed=0)
    fit = fit_svi(ppca.model, ExactGuide(ppca), x, steps=4, seed=0)
    return [fit.objective, *parameters(ppca)]


def autoencoder(x):
    made = Autoencoder.mlp(D, K, hidden=(8,), seed=0).double().to(x.device)
    return [fit_svi(made.model, made.guide, x, steps=4, seed=0).objective, *parameters(made)]


def pca(x):
    made = Autoencoder.linear(D, K, seed=0).double().to(x.device)
    fit_pca(made, x)
    return parameters(made)


def em(x):
    ppca = PPCA.like(x, K, seed=0)
    fit = fit_em(ppca, x, max_iterations=8)
    return [fit.objective, fit.log_likelihood, *parameters(ppca)]


def closed(x):
    ppca = PPCA.like(x, K, seed=0)
    fit = fit_closed_form(ppca, x)
    return [fit.objective, *parameters(ppca), ppca.log_likelihood(x).detach()]


def estimate(x, **options):
    pair = vae(x.device)
    found = log_likelihood(pair.model, pair.guide, x[:8], num_samples=20, seed=0, **options)
    return [found.value, found.standard_error, found.k_hat]


ENTRY_POINTS = {
    "svi": svi,
    "iwae": lambda x: svi(x, IWAE(3)),
    "mean_elbo": lambda x: svi(x, ELBO(2)),
    "bf16": lambda x: svi(x.float(), precision="bf16"),
    "exact": exact,
    "autoencoder": autoencoder,
    "em": em,
    "em_missing": lambda x: em(data(0.2).to(x.device)),
    "closed_form": closed,
    "pca": pca,
    "elbo": lambda x: [elbo(*programs(x), x, seed=0)],
    "plain": estimate,
    "refined": lambda x: estimate(x, refine=5),
    "annealed": lambda x: estimate(x, method="annealed", annealing=Annealing(num_temperatures=4)),
    "gaps": lambda x: [
        gaps(*programs(x), x[:5], steps=4, num_samples=9, tolerance=None, seed=0).best_elbo
    ],
    "collapse": lambda x: [collapse(*programs(x), x, seed=0).kl],
    "impute": lambda x: [fitted(x).impute(data(0.2).to(x.device)).mean],
    "subspace": lambda x: [subspace(fitted(x), PPCA.like(x, K, seed=1)).angles],
    "sample": lambda x: [sample(fitted(x))],
}


def programs(x):
    pair = vae(x.device)
    return pair.model, pair.guide


def fitted(x):
    ppca = PPCA.like(x, K, seed=0)
    fit_closed_form(ppca, x)
    return ppca


def sample(ppca):
    pyro.set_rng_seed(0)
    return ppca.model(num_data=3).detach()


LONGER = ("annealed", "gaps", "em_missing", "refined", "autoencoder", "mean_elbo")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in LONGER else []) for n in ENTRY_POINTS],
)
def test_entry_points_have_the_bits_of_the_cpu(name, monkeypatch):
    # On a CPU products and eigenvalues are numpy's, which torch's equal up to rounding only.
    monkeypatch.setattr("ppl_vae.models.linear.eigen.product", torch.matmul)
    monkeypatch.setattr("ppl_vae.models.linear.eigen.symmetric_eigen", torch.linalg.eigh)
    for module in ("models.linear.sufficient_statistics", "inference.em.complete_data"):
        monkeypatch.setattr(f"ppl_vae.{module}.product", torch.matmul, raising=False)
    expected = ENTRY_POINTS[name](data())
    with pretended_device() as device:
        found = ENTRY_POINTS[name](data().to(device))
        assert len(found) == len(expected) > 0
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(other.cpu(), one, rtol=0, atol=0, equal_nan=True)


# Where the host waits


def total(waits, kind=None):
    return sum(count for wait, count in waits.items() if kind in (None, wait.kind))


def waits_of_fit(device, steps, **options):
    pair = vae(device)
    x = data().to(device)
    with count_waits() as waits:
        fit_svi(pair.model, pair.guide, x, steps=steps, batch_size=16, seed=0, **options)
    return total(waits)


@pytest.mark.parametrize(
    "options",
    [{"grad_clip": 1.0, "warmup": 10}, pytest.param({}, marks=pytest.mark.slow)],
    ids=["clipped", "plain"],
)
def test_a_training_step_waits_at_readings_only(device, options):
    short, long = (waits_of_fit(device, s, **options) for s in (10, READ_INTERVAL))
    assert long - short <= 1  # one more reading of the objective


def test_an_iteration_of_em_waits_three_times(device):
    x = data().to(device)
    found = []
    for iterations in (4, 8):
        ppca = PPCA.like(x, K, seed=0)
        with count_waits() as waits:
            fit = fit_em(ppca, x, tol=0.0, max_iterations=iterations)
        assert fit.steps == iterations
        found.append(total(waits))
    assert found[1] - found[0] <= 3 * 4
    assert found[0] < 71


def test_an_iteration_of_em_with_missing_values_waits_five_times(device):
    """For the values of both half-steps, and for checks of three factorizations."""
    x, found = data(missing=0.2).to(device), []
    for iterations in (4, 8):
        ppca = PPCA.like(x, K, seed=0)
        with count_waits() as waits:
            fit = fit_em(ppca, x, tol=1e-300, max_iterations=iterations)
        assert fit.steps == iterations
        found.append(total(waits))
    assert found[1] - found[0] <= 5 * 4


def waits_of(call, arguments):
    """The number of waits of each call."""
    found = []
    for argument in arguments:
        with count_waits() as waits:
            call(argument)
        found.append(total(waits))
    return found


def test_importance_sampling_waits_per_block_and_not_per_datum(device):
    pair, x = vae(device), data().to(device)
    found = waits_of(
        lambda rows: log_likelihood(pair.model, pair.guide, rows, 30, seed=0, capture=False),
        (x[:20], x),
    )
    assert found[0] == found[1] < 100


@pytest.mark.slow
def test_a_step_towards_the_local_optimum_does_not_wait(device):
    pair, x = vae(device), data().to(device)[:5]
    options = {"num_samples": 9, "tolerance": None, "seed": 0}
    found = waits_of(
        lambda steps: gaps(pair.model, pair.guide, x, steps=steps, **options), (2, 12)
    )
    assert found[0] == found[1] < 250


@pytest.mark.slow
def test_a_temperature_of_annealing_does_not_wait(device):
    pair, x = vae(device), data().to(device)[:5]

    def estimate(number):
        annealing = Annealing(num_temperatures=number)
        log_likelihood(
            pair.model, pair.guide, x, 4, method="annealed", annealing=annealing, seed=0
        )

    found = waits_of(estimate, (3, 6))
    assert found[0] == found[1] < 150


def test_collapse_waits_per_block_and_not_per_datum(device):
    pair, x = vae(device), data().to(device)
    found = waits_of(lambda rows: collapse(pair.model, pair.guide, rows, seed=0), (x[:20], x))
    assert found[1] <= found[0] < 200
