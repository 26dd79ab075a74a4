"""Fits whose steps are recorded as tensor operations: their numbers are those of eager fits."""

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import combinations
import oracles
import user_pairs
from ppl_vae import ELBO, IWAE, PPCA, VAE, AmortizedGuide, PerDatumGuide, elbo, fit_svi
from ppl_vae.core.introspection import tensors_of
from ppl_vae.likelihoods import Bernoulli, Gaussian

N, D, K = 50, 6, 2


@pytest.fixture
def x():
    return oracles.simulate_ppca((5.0, 2.0), 0.5, N, D, seed=0)


def fit(make, x, capture, **settings):
    """The fit, and what shows its end: tensors of the pair, and ELBOs of rows."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    model, guide = make()
    result = fit_svi(model, guide, x, seed=0, capture=capture, progress=False, **settings)
    store = [p for _, p in sorted(pyro.get_param_store().named_parameters())]
    found = [*tensors_of(model, guide), *store, elbo(model, guide, x, seed=0)]
    return result, [t.detach().clone() for t in found]


def assert_same_fits(make, x, **settings):
    eager, tensors = fit(make, x, False, **settings)
    recorded, others = fit(make, x, "recorded", **settings)
    assert recorded.execution == "recorded: as requested"
    assert torch.equal(eager.objective, recorded.objective)
    assert len(tensors) == len(others)
    assert all(map(torch.equal, tensors, others))
    if eager.validation is not None:
        assert torch.equal(eager.validation, recorded.validation)


def amortized():
    ppca = PPCA(D, K).double()
    return ppca.model, AmortizedGuide(nn.Linear(D, 2 * K), K).double()


def with_batch_normalisation():
    vae = VAE(
        encoder=nn.Sequential(
            nn.Linear(D, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 2 * K)
        ),
        decoder=nn.Sequential(nn.Linear(K, 8), nn.Tanh(), nn.Linear(8, D)),
        likelihood=Gaussian("shared"),
        data_dim=D,
        latent_dim=K,
    ).double()
    return vae.model, vae.guide


def per_datum():
    ppca = PPCA(D, K).double()
    return ppca.model, PerDatumGuide(N, K).double()


@pytest.mark.parametrize(
    ("name", "batch_size"), combinations.one_in(4, user_pairs.PAIRS, [None, 7])
)
def test_every_pair_has_the_numbers_of_an_eager_fit(name, batch_size, float64):
    x = user_pairs.PAIRS[name]()[2]
    assert_same_fits(lambda: user_pairs.PAIRS[name]()[:2], x, steps=20, batch_size=batch_size)


SETTINGS = {
    "adamw, clipped": {"optimizer": torch.optim.AdamW, "grad_clip": 0.5},
    "momentum": {"optimizer": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9), "lr": 1e-3},
    "rmsprop": {"optimizer": torch.optim.RMSprop},
    "nadam": {"optimizer": torch.optim.NAdam},
    "scheduler": {"scheduler": CosineAnnealingLR},
    "warm-up": {"warmup": 10, "objective": ELBO(beta=0.5)},
    "iwae": {"objective": IWAE(4, gradient="dreg")},
}


@pytest.mark.parametrize("name", combinations.one_in(3, SETTINGS))
def test_settings_of_the_optimization(name, x):
    assert_same_fits(amortized, x, steps=25, batch_size=12, **{"lr": 0.01, **SETTINGS[name]})


def test_objectives_of_pyro_are_computed_in_another_order(x):
    settings = {"objective": Trace_ELBO(), "steps": 25, "batch_size": 12, "lr": 0.01}
    eager, tensors = fit(amortized, x, False, **settings)
    recorded, others = fit(amortized, x, "recorded", **settings)
    torch.testing.assert_close(eager.objective, recorded.objective, rtol=1e-12, atol=0)
    for one, other in zip(tensors, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", [with_batch_normalisation, per_datum])
def test_buffers_and_tables(make, x):
    assert_same_fits(make, x, epochs=6, batch_size=12)


def test_missing_values_and_validation_rows(x):
    incomplete = oracles.with_missing_values(x, 0.2, seed=1)

    def make():
        vae = VAE.mlp(D, K, hidden=(8,), missing="zeros+mask", seed=0).double()
        return vae.model, vae.guide

    assert_same_fits(make, incomplete[:40], x_val=incomplete[40:], epochs=8, batch_size=12)


def test_data_that_are_transformed_in_each_epoch():
    x = (torch.rand(N, D) > 0.5).float()

    def make():
        vae = VAE.mlp(D, K, hidden=(8,), likelihood=Bernoulli(), seed=0)
        return vae.model, vae.guide

    def transform(x, generator):
        return torch.bernoulli(0.8 * x + 0.1, generator=generator)

    assert_same_fits(make, x, epochs=6, batch_size=12, epoch_transform=transform)


def test_what_cannot_be_recorded_runs_eagerly_and_is_said_once(x):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(D, 2 * K)

        def forward(self, x):
            return self.layer(x) if float(x.mean()) > -1e9 else self.layer(-x)

    def make():
        ppca = PPCA(D, K).double()
        return ppca.model, AmortizedGuide(Branching(), K).double()

    eager, tensors = fit(make, x, False, steps=10)
    with pytest.warns(UserWarning, match="could not be captured, so it runs eagerly") as warned:
        other, others = fit(make, x, "recorded", steps=10)
    assert len(warned) == 1 and "reads a value of a tensor" in other.execution
    assert torch.equal(eager.objective, other.objective)
    assert all(map(torch.equal, tensors, others))


def test_a_resumed_fit_may_be_recorded(x, tmp_path):
    whole, tensors = fit(amortized, x, False, epochs=10, batch_size=12)
    fit(amortized, x, "recorded", epochs=4, batch_size=12, checkpoint=tmp_path / "fit.pt")
    resumed, others = fit(
        amortized, x, "recorded", epochs=10, batch_size=12, checkpoint=tmp_path / "fit.pt"
    )
    assert torch.equal(whole.objective, resumed.objective)
    assert all(map(torch.equal, tensors, others))


def test_auto_records_a_long_fit(x, monkeypatch):
    monkeypatch.setattr("ppl_vae.capture.policy.RECORDING_CALLS", 1)
    eager, tensors = fit(amortized, x, False, steps=80)
    found, others = fit(amortized, x, "auto", steps=80)
    assert found.execution.startswith("recorded: about ")
    assert torch.equal(eager.objective, found.objective)
    assert all(map(torch.equal, tensors, others))
