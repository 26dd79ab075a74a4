"""On a GPU captured steps and estimates equal eager ones and do not wait for the device."""

import pytest
import torch

import oracles
from ppl_vae import ELBO, PPCA, VAE, Autoencoder, ExactGuide, elbo, fit_svi, log_likelihood
from ppl_vae.core.introspection import modules_of
from ppl_vae.core.pair import Pair
from ppl_vae.core.state import isolated_store, seeded, validation
from ppl_vae.inference.svi.batches.minibatch import MinibatchObjective, WeightedObjective
from ppl_vae.inference.svi.parameters import find_parameters
from ppl_vae.inference.svi.settings import Optimization
from ppl_vae.inference.svi.steps.captured_step import CapturedSteps
from ppl_vae.inference.svi.steps.optimizer_step import OptimizerStep

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
N, D = 512, 12


def steps_of(dtype=torch.float32, optimizer=torch.optim.Adam, lr=1e-3, compiled=True):
    vae = VAE.mlp(D, 3, hidden=(16,), seed=0).to("cuda", dtype)
    x = vae.sample(N, seed=1)
    batch = MinibatchObjective(
        Pair(vae.model, vae.guide), WeightedObjective(ELBO(), None), x, None
    )
    rows = torch.arange(64, device="cuda")
    named = find_parameters(batch.pair, lambda: batch.value(rows, 1))
    update = OptimizerStep(
        named, modules_of(vae.model, vae.guide), Optimization(lr=lr, optimizer=optimizer)
    )
    return batch, update, CapturedSteps(batch, update, named, 4, compiled=compiled)


def batches(count):
    generator = torch.Generator("cuda").manual_seed(0)
    return [torch.randperm(N, generator=generator, device="cuda")[:64] for _ in range(count)]


def test_captured_steps_equal_eager_steps():
    found = []
    for capture in (False, True):
        batch, update, captured = steps_of(torch.float64, compiled=False)
        values = []
        with isolated_store(), seeded(3), validation(False):
            for start in range(0, 16, 4):
                chunk = batches(16)[start : start + 4]
                if capture:
                    values += captured.run_steps(chunk, start).tolist()
                    continue
                for rows in chunk:
                    value = batch.value(rows, 1)
                    values.append(float(value.detach()))
                    update.apply(value, rows)
        found.append((values, [p.detach().clone() for p in update.parameters]))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-9)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_a_cuda_graph_has_new_draws_at_each_step_with_the_mean_of_eager_steps():
    batch, _, captured = steps_of(torch.float64, torch.optim.SGD, lr=1e-12)
    rows = [torch.arange(64, device="cuda")] * 4
    with isolated_store(), seeded(0), validation(False):
        eager = torch.stack([batch.value(rows[0], 1).detach() for _ in range(800)])
        graph = torch.cat([captured.run_steps(rows, 0) for _ in range(200)])
    assert len(set(graph.tolist())) == len(graph)
    error = (eager.var() / len(eager) + graph.var() / len(graph)).sqrt()
    assert abs(float((eager.mean() - graph.mean()) / error)) < oracles.z_limit()


def test_steps_do_not_wait_for_the_device():
    _, _, captured = steps_of()
    rows = batches(4)
    with isolated_store(), validation(False):
        captured.run_steps(rows, 0)
        torch.cuda.synchronize()
        before = torch.cuda.get_sync_debug_mode()
        try:
            torch.cuda.set_sync_debug_mode("error")
            values = [captured.run_steps(rows, 4 * k) for k in range(5)]
        finally:
            torch.cuda.set_sync_debug_mode(before)
    assert all(bool(v.isfinite().all()) for v in values)


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_a_captured_fit_reaches_the_exact_posterior(precision):
    x = torch.from_numpy(oracles.simulate_ppca((16, 8, 4), 1, N, D, seed=0)).float().cuda()
    ends = {}
    for capture in (False, True):
        ppca = PPCA.like(x, 3, seed=0).cuda()
        fit = fit_svi(
            ppca.model, ExactGuide(ppca), x, steps=1000, batch_size=128, lr=1e-2, seed=0,
            capture=capture, precision=precision,
        )  # fmt: skip
        assert fit.execution.startswith("compiled" if capture else "eager")
        ends[capture] = float(ppca.log_likelihood(x).mean())
    assert ends[True] == pytest.approx(ends[False], abs=0.1)


def test_captured_estimates_equal_the_exact_values():
    x = torch.from_numpy(oracles.simulate_ppca((16, 8, 4), 1, N, D, seed=0)).float().cuda()
    ppca = PPCA.like(x, 3, seed=0).cuda()
    found = log_likelihood(ppca.model, ExactGuide(ppca), x, 200, seed=0, capture=True)
    assert found.execution == "compiled"
    truth = ppca.log_likelihood(x).double().cpu()
    torch.testing.assert_close(found.value, truth, rtol=0, atol=1e-3)


def test_a_masked_autoencoder_trains_equally_well_captured_and_eagerly():
    # All patches of an image are equal, so two of them determine the others.
    part = torch.randn(N, 1, 1, 2, 1, 2, generator=torch.Generator().manual_seed(0))
    x = part.expand(N, 1, 2, 2, 2, 2).reshape(N, 16).cuda()
    ends = {}
    for capture in (False, True):
        made = Autoencoder.masked((1, 4, 4), 2, share=0.5, width=16, depth=1, seed=0).cuda()
        fit = fit_svi(
            made.model, made.guide, x, steps=600, batch_size=128, lr=3e-3, seed=0, capture=capture
        )
        assert fit.execution.startswith("compiled" if capture else "eager")
        ends[capture] = float(elbo(made.model, made.guide, x, seed=0).mean())
    assert ends[True] == pytest.approx(ends[False], abs=0.3)
