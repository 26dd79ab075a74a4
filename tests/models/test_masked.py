"""Masked autoencoders: patches, which are hidden, what is scored, and what the encoder sees."""

import copy
import itertools
import math

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from scipy.special import erf
from test_capture import agree, both_ways
from torch import nn

import oracles
from ppl_vae import (
    ELBO,
    IWAE,
    PPCA,
    VAE,
    AmortizedGuide,
    Annealing,
    Autoencoder,
    Bernoulli,
    Categorical,
    Gaussian,
    GaussianNoise,
    HiddenPatches,
    Multinomial,
    PatchDecoder,
    PatchTransformer,
    best_codes,
    collapse,
    digits,
    elbo,
    fit_closed_form,
    fit_svi,
    gaps,
    impute,
    load,
    log_likelihood,
    log_weights,
    mlp,
    save,
)
from ppl_vae.core.state import eval_mode, seeded, validation
from ppl_vae.evaluation.latent_space.traversal import interpolate
from ppl_vae.evaluation.prediction.predictive import decode, encode, latent_means, reconstruct
from ppl_vae.networks.mlp_conv import conv_encoder
from ppl_vae.networks.patches import Patches, Subsets

GRIDS = [((1, 8, 8), 2), ((3, 4, 6), (2, 3)), ((2, 6, 4), (3, 1)), ((1, 1, 6), (1, 2))]
SHAPE, PATCH, D, P = (2, 4, 6), (2, 3), 48, 4
HIDING = HiddenPatches(SHAPE, PATCH, share=0.5)
N, K = 30, 5


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def made(**how):
    told = {"width": 8, "depth": 2, "heads": 2, "decoder_width": 6} | {"share": 0.5, "seed": 0}
    return Autoencoder.masked(SHAPE, PATCH, **(told | how)).double()


def plain(missing="zeros+mask", **how):
    """A masked autoencoder of multilayer perceptrons."""
    inputs = {"zeros": D, "zeros+mask": 2 * D}[missing]
    width = D * how.get("likelihood", Gaussian(1.0)).outputs_per_dim
    nets = {"encoder": mlp(inputs, K, (7,), seed=0), "decoder": mlp(K, width, (7,), seed=1)}
    sizes = {"data_dim": D, "latent_dim": K}
    return Autoencoder(**nets, **sizes, missing=missing, hiding=HIDING, **how).double()


def both_traces(pair, x, seed=0, **told):
    with seeded(seed):
        guide = poutine.trace(pair.guide).get_trace(x, **told)
        model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(x, **told)
    return guide.nodes, model.nodes


def masked_cv(marks, image_shape=SHAPE, patch=PATCH):
    """By a loop over pixels, from the marks of one image's patches."""
    (channels, height, width), (high, wide) = image_shape, patch
    found = np.zeros(image_shape, dtype=bool)
    for c, i, j in itertools.product(range(channels), range(height), range(width)):
        found[c, i, j] = marks[(i // high) * (width // wide) + j // wide] > 0
    return found.ravel()


# Patches


@pytest.mark.parametrize(("shape", "patch"), GRIDS)
def test_patches_are_blocks_of_the_image(shape, patch):
    grid = Patches(shape, patch)
    (channels, height, width), (high, wide) = shape, grid.sides
    image = np.arange(grid.data_dim).reshape(shape)
    blocks = [
        image[:, i : i + high, j : j + wide].ravel()
        for i, j in itertools.product(range(0, height, high), range(0, width, wide))
    ]
    cut = grid.cut(torch.from_numpy(image.ravel())[None])[0]
    np.testing.assert_array_equal(cut, blocks)
    assert (grid.number, grid.width) == (len(blocks), len(blocks[0]))
    assert grid.number * grid.width == grid.data_dim == channels * height * width


@pytest.mark.parametrize(("shape", "patch"), GRIDS)
def test_cutting_is_a_permutation_that_joining_undoes(shape, patch):
    grid = Patches(shape, patch)
    rows = draw(2, 5, grid.data_dim)  # with a further dimension on the left
    cut = grid.cut(rows)
    assert cut.shape == (2, 5, grid.number, grid.width)
    assert torch.equal(cut.flatten(2).sort().values, rows.sort().values)
    assert torch.equal(grid.join(cut), rows)
    assert torch.equal(cut[1, 3], grid.cut(rows[1, 3]))


@pytest.mark.parametrize(("shape", "patch"), GRIDS)
def test_an_entrys_outputs_stay_beside_one_another(shape, patch):
    grid = Patches(shape, patch)
    outputs = draw(3, grid.number, grid.width, 2)
    rows = grid.join(outputs.flatten(2), 2).unflatten(1, (grid.data_dim, 2))
    for place in range(2):
        assert torch.equal(rows[..., place], grid.join(outputs[..., place]))


@pytest.mark.parametrize(("shape", "patch"), GRIDS)
def test_cells_of_patches_are_found(shape, patch):
    grid = Patches(shape, patch)
    marks = draw(6, grid.number) > 0
    marks[0, 0] = True
    cells = grid.cells(marks)
    for row, cell in zip(marks.numpy(), cells, strict=True):
        np.testing.assert_array_equal(cell, masked_cv(row, shape, grid.sides))
    assert torch.equal(grid.whole(cells), marks)
    torn = cells.clone()
    torn[0, cells[0].nonzero()[0]] = False  # one entry less
    lost = (grid.whole(torn) != marks).nonzero()
    assert lost.tolist() == [[0, int(marks[0].nonzero()[0])]]


# Which are hidden


def test_all_subsets_are_equally_probable():
    subsets = Subsets(5, 2, torch.zeros(()).double())
    every = torch.tensor(list(itertools.product([0.0, 1.0], repeat=5))).double()
    value = subsets.log_prob(every)
    inside = every.sum(1) == 2
    torch.testing.assert_close(value[inside].exp(), torch.full((10,), 0.1).double())
    assert bool((value[~inside] == -math.inf).all())
    many = 20_000
    with seeded(0):
        drawn = subsets.expand([many]).sample()
    assert drawn.dtype == torch.float64 and bool((subsets.log_prob(drawn) > -10).all())
    number = drawn @ 2 ** torch.arange(5).double()
    shares = number.unique(return_counts=True)[1].double() / many
    assert len(shares) == 10
    score = (shares - 0.1) / math.sqrt(0.1 * 0.9 / many)
    assert float(score.abs().max()) < oracles.z_limit(10)


def test_subsets_are_drawn_row_by_row_and_scored_in_any_batch():
    subsets = Subsets(6, 2, torch.zeros(())).expand([4, 7])
    with seeded(0):
        value = subsets.rsample(torch.Size([3]))
    assert value.shape == (3, 4, 7, 6) and value.dtype == torch.float32
    assert len(value.reshape(-1, 6).unique(dim=0)) > 10
    assert subsets.log_prob(value).shape == (3, 4, 7)
    assert subsets.log_prob(value[0, 0, 0].bool()).shape == (4, 7)
    with pytest.raises(ValueError, match="within the support"), validation(True):
        Subsets(6, 2, torch.zeros(()), validate_args=True).log_prob(2 * value)


def test_what_is_hidden_is_said_and_drawn_anew():
    hiding = HiddenPatches([1, 8, 8], 2)
    assert (hiding.number, hiding.num_hidden, hiding.num_seen) == (16, 12, 4)
    assert hiding == HiddenPatches((1, 8, 8), (2, 2), 0.75) == HiddenPatches(**hiding.config())
    seen = hiding.visible(50, seed=0)
    assert seen.shape == (50, 64) and bool((hiding.whole(seen).sum(1) == 4).all())
    assert bool((seen.sum(1) == 16).all())
    assert torch.equal(seen, hiding.visible(50, seed=0))
    assert not torch.equal(seen, hiding.visible(50, seed=1))


# Losses by hand


@pytest.mark.parametrize("missing", ["zeros", "zeros+mask"])
@pytest.mark.parametrize("holes", [False, True])
def test_minus_the_log_joint_is_the_loss_of_hidden_patches_and_its_constant(missing, holes):
    sigma = 0.7
    pair = plain(missing, likelihood=Gaussian(sigma), prior="laplace", penalty=0.3)
    x, there = draw(N, D), torch.ones(N, D, dtype=torch.bool)
    told = {}
    if holes:
        there = draw(N, D, seed=1) < 0.8
        told = {"mask": there}
    guide, model = both_traces(pair, torch.where(there, x, 7.0), **told)
    hidden = torch.from_numpy(np.stack([masked_cv(r) for r in guide["hidden"]["value"]]))
    assert bool((hidden.sum(1) == D / 2).all())
    seen = ~hidden & there
    inputs = torch.where(seen, x, 0.0)
    inputs = inputs if missing == "zeros" else torch.cat([inputs, seen.double()], 1)
    codes = pair.guide.encoder(inputs)
    squares = (x - pair.decoder(codes)).square() / (2 * sigma**2)
    scored = hidden & there
    loss = torch.where(scored, squares, 0.0).sum(1) + 0.3 * codes.abs().sum(1)
    constant = scored.double().sum(1) * math.log(2 * math.pi * sigma**2) / 2 + K * math.log(
        2 / 0.3
    )
    chosen = math.log(math.comb(P, P // 2))
    joint = sum(s["fn"].log_prob(s["value"]) for s in map(model.get, ("hidden", "z", "x")))
    close = {"rtol": 1e-13, "atol": 1e-12}
    torch.testing.assert_close(-joint, loss + constant + chosen, **close)
    log_q = guide["hidden"]["fn"].log_prob(guide["hidden"]["value"])
    torch.testing.assert_close(log_q, torch.full_like(log_q, -chosen), **close)
    expected = -(loss + constant).detach()
    given = torch.where(there, x, math.nan)
    found = elbo(pair.model, pair.guide, given, seed=0)
    torch.testing.assert_close(found, expected, **close)
    weights = log_weights(pair.model, pair.guide, given, seed=0)[0]
    torch.testing.assert_close(weights.detach(), expected, **close)


def test_each_draw_under_a_plate_of_samples_has_hidden_patches_of_its_own():
    pair, x, S = made(), draw(N, D), 3
    with seeded(0), pyro.plate("draws", S, dim=-2):
        guide = poutine.trace(pair.guide).get_trace(x)
        model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(x)
    hidden = guide.nodes["hidden"]["value"]
    assert hidden.shape == (S, N, P) and len(hidden[:, 0].unique(dim=0)) > 1
    for s in range(S):
        seen = ~HIDING.cells(hidden[s].bool())
        codes = pair.guide.encoder(torch.cat([torch.where(seen, x, 0.0), seen.double()], 1))
        torch.testing.assert_close(guide.nodes["z"]["value"][s], codes)
        cells = -0.5 * ((x - pair.decoder(codes)).square() + math.log(2 * math.pi))
        expected = torch.where(seen, 0.0, cells).sum(1)
        site = model.nodes["x"]
        torch.testing.assert_close(site["fn"].log_prob(site["value"])[s], expected)
    several = log_weights(pair.model, pair.guide, x, 400, seed=0).detach()
    assert several.shape == (400, N)
    average = elbo(pair.model, pair.guide, x, num_samples=400, seed=1)
    score = (several.mean(0) - average) / (several.std(0) * math.sqrt(2 / 400))
    assert float(score.abs().max()) < oracles.z_limit(N)


@pytest.mark.parametrize("likelihood", [Bernoulli, lambda: Gaussian("network")])
def test_any_likelihood_of_cells_scores_them(likelihood):
    pair, x = made(likelihood=likelihood()), (draw(N, D) > 0).double()
    guide, model = both_traces(pair, x)
    seen = ~HIDING.cells(guide["hidden"]["value"].bool())
    cells = pair.given(guide["z"]["value"]).base_dist.log_prob(x)
    expected = torch.where(seen, 0.0, cells).sum(1)
    torch.testing.assert_close(model["x"]["fn"].log_prob(x), expected)


def test_an_optimal_scale_is_that_of_hidden_cells():
    pair, x = made(likelihood=Gaussian("optimal")), draw(N, D)
    guide, model = both_traces(pair, x)
    hidden = HIDING.cells(guide["hidden"]["value"].bool())
    error = x - pair.decoder(guide["z"]["value"])
    scale = error[hidden].square().mean().sqrt()
    expected = -0.5 * ((error / scale).square() + torch.log(2 * math.pi * scale**2))
    expected = torch.where(hidden, expected, 0.0).sum(1)
    torch.testing.assert_close(model["x"]["fn"].log_prob(x), expected)


# What the encoder sees


@pytest.mark.parametrize("make", [made, plain], ids=["transformer", "perceptron"])
def test_what_is_hidden_is_not_seen(make):
    pair, x = make(), draw(N, D)
    first, _ = both_traces(pair, x.requires_grad_())
    hidden = HIDING.cells(first["hidden"]["value"].bool())
    (slope,) = torch.autograd.grad(first["z"]["value"].square().sum(), x)
    assert bool((slope[hidden] == 0).all()) and bool((slope[~hidden] != 0).all())
    x = x.detach()
    other, _ = both_traces(pair, torch.where(hidden, 100 * draw(N, D, seed=1), x))
    assert torch.equal(other["hidden"]["value"], first["hidden"]["value"])
    assert torch.equal(other["z"]["value"], first["z"]["value"])


def weights_of(module):
    return {name: p.detach().numpy() for name, p in module.named_parameters()}


def normed(rows, weights, name):
    away = rows - rows.mean(-1, keepdims=True)
    scale = np.sqrt((away**2).mean(-1, keepdims=True) + 1e-5)
    return away / scale * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def affine(rows, weights, name):
    return rows @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def attended(tokens, layer, heads):
    """A pre-norm transformer layer on the tokens of one row, (V, E), by numpy."""
    w = weights_of(layer)
    w |= {f"in.{kind}": w[f"self_attn.in_proj_{kind}"] for kind in ("weight", "bias")}
    parts = np.split(affine(normed(tokens, w, "norm1"), w, "in"), 3, axis=1)
    heard = []
    for q, k, v in zip(*(np.split(part, heads, axis=1) for part in parts), strict=True):
        score = np.exp(q @ k.T / math.sqrt(q.shape[1]))
        heard.append(score / score.sum(1, keepdims=True) @ v)
    tokens = tokens + affine(np.concatenate(heard, 1), w, "self_attn.out_proj")
    inner = affine(normed(tokens, w, "norm2"), w, "linear1")
    inner = inner * (1 + erf(inner / math.sqrt(2))) / 2
    return tokens + affine(inner, w, "linear2")


def encoded(network, row, seen, heads=2):
    """The code of one image, from its wholly seen patches alone."""
    w, grid = weights_of(network), network.patches
    patches, whole = grid.cut(row).numpy(), grid.whole(seen).numpy()
    tokens = affine(patches[whole], w, "embed") + w["positions"][whole]
    for layer in network.layers:
        tokens = attended(tokens, layer, heads)
    code = np.zeros(w["positions"].shape)
    code[whole] = normed(tokens, w, "norm")
    return code.ravel()


@pytest.mark.parametrize("training", [True, False])
def test_the_transformer_is_the_obvious_one_on_the_patches_that_are_there(training):
    network = PatchTransformer(SHAPE, PATCH, 8, 2, 2, seed=0).double().train(training)
    x, patches = draw(N, D), draw(N, P, seed=1) > 0
    patches[:, 2] |= ~patches.any(1)  # numbers differ, none is 0
    seen = network.patches.cells(patches)
    seen[0, 0] = False  # a missing value, in a patch that is not whole then
    assert len(set(network.patches.whole(seen).sum(1).tolist())) > 2
    expected = [encoded(network, *pair) for pair in zip(x, seen, strict=True)]
    rows = torch.cat([torch.where(seen, x, 0.0), seen.double()], 1)
    with torch.set_grad_enabled(training):
        np.testing.assert_allclose(network(rows).detach(), expected, rtol=1e-10, atol=1e-12)
        few = network.patches.whole(seen).sum(1) <= 2
        told = network(rows[few], num_seen=2).detach()
    np.testing.assert_allclose(told, np.array(expected)[few], rtol=1e-10, atol=1e-12)


def test_the_decoder_is_the_obvious_one():
    how = {"code_width": 3, "width": 8, "depth": 2, "heads": 4, "outputs_per_dim": 2}
    network = PatchDecoder(SHAPE, PATCH, **how, seed=0).double()
    with torch.no_grad():
        network.bias.copy_(draw(2 * D, seed=1))
    codes, w = draw(N, 3 * P), weights_of(network)
    expected = []
    for code in codes.numpy():
        tokens = affine(code.reshape(P, 3), w, "embed") + w["positions"]
        for layer in network.layers:
            tokens = attended(tokens, layer, 4)
        out = normed(tokens, w, "norm") @ w["last.weight"].T
        expected.append(network.patches.join(torch.from_numpy(out), 2).numpy() + w["bias"])
    np.testing.assert_allclose(network(codes).detach(), expected, rtol=1e-10, atol=1e-12)


def test_only_the_patches_that_are_left_are_worked_on():
    pair, sizes = made(share=0.75), []
    layers = pair.guide.encoder.layers
    layers[0].register_forward_hook(lambda module, args, out: sizes.append(args[0].shape))
    x = draw(N, D)
    elbo(pair.model, pair.guide, x)
    log_weights(pair.model, pair.guide, x)
    pair.features(x)
    assert sizes == [(N, 1, 8), (N, 1, 8), (N, 4, 8)]


def test_rows_with_holes_of_their_own_train_and_rows_with_nothing_left_do_not_spoil_it():
    pair, x = made(likelihood=Gaussian(1.0)), draw(N, D)
    x[:, :2] = math.nan  # the first patch is never whole
    x[: N // 2, D // 2 - 4 : D // 2] = math.nan  # nor, for half of the rows, the last
    told = {"mask": ~x.isnan()}
    guide, _ = both_traces(pair, x.nan_to_num(), seed=1, **told)
    codes = guide["z"]["value"]
    nothing = (codes == 0).all(1)
    assert bool(nothing.any()) and not bool(nothing.all())
    weights = log_weights(pair.model, pair.guide, x, seed=1)
    weights.sum().backward()
    assert bool(weights.isfinite().all())
    assert all(bool(p.grad.isfinite().all()) for p in pair.parameters())
    fit = fit_svi(pair.model, pair.guide, x, steps=5, batch_size=10, capture=False, seed=0)
    assert fit.steps == 5 and bool(fit.objective.isfinite().all())
    torn = draw(N, D)
    torn[3] = torch.where(pair.hiding.cells(torch.ones(1, P)) > 0, torn[3], 0.0)
    torn[3, [0, 3, 12, 15]] = math.nan
    with pytest.raises(ValueError, match=r"rows of which no patch is wholly observed: \[3\]"):
        pair.features(torn)


# Whole images


@pytest.mark.parametrize("make", [made, plain], ids=["transformer", "perceptron"])
def test_features_are_those_of_whole_images(make):
    pair, x = make(), draw(N, D)
    everything = torch.ones_like(x)
    codes = pair.guide.encoder(torch.cat([x, everything], 1)).detach()
    torch.testing.assert_close(pair.features(x), codes)
    torch.testing.assert_close(pair.reconstruct(x), pair.decoder(codes).detach())
    mine = pair.model, pair.guide
    torch.testing.assert_close(encode(*mine, x), codes)
    assert set(latent_means(*mine, x)) == {"z"}
    torch.testing.assert_close(reconstruct(*mine, x), pair.reconstruct(x))
    torch.testing.assert_close(decode(pair.model, codes, x), pair.reconstruct(x))
    assert interpolate(pair.model, x[:2], x[2:4], guide=pair.guide).shape == (2, 8, D)
    assert pair.hiding == HIDING  # given back


def test_patches_are_hidden_again_after_a_measurement_that_fails():
    pair = made()
    pair.eval()
    for program in (pair.model, pair.guide, poutine.scale(pair.guide, 1.0)):
        with pytest.raises(KeyError), eval_mode(program):
            assert pair.hiding is None
            assert "hidden" not in poutine.trace(pair.guide).get_trace(draw(N, D)).nodes
            raise KeyError
        assert pair.hiding == HIDING and not pair.training


def test_what_is_not_seen_is_painted_from_what_is():
    pair, x = made(), draw(N, D)
    seen = HIDING.visible(N, seed=0)
    inputs = torch.cat([torch.where(seen, x, 0.0), seen.double()], 1)
    expected = pair.decoder(pair.guide.encoder(inputs)).detach()
    torch.testing.assert_close(pair.reconstruct(x, mask=seen), expected)
    torch.testing.assert_close(pair.reconstruct(torch.where(seen, x, math.nan)), expected)
    codes = pair.features(x, mask=seen).unflatten(1, (P, 8))
    assert torch.equal((codes == 0).all(2), ~HIDING.whole(seen))


def test_the_best_codes_are_of_all_that_was_observed():
    pair, x = plain(), draw(N, D)
    found = best_codes(pair, x, max_iterations=5)
    expected = pair.decode(found.codes).log_prob(x)
    torch.testing.assert_close(found.log_joint.detach(), expected)


# As a pair


@pytest.mark.parametrize("kind", [Trace_ELBO, TraceMeanField_ELBO])
def test_pyros_own_losses_are_the_same_and_train_it(kind):
    pair, x = made(), draw(N, D)
    svi = SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 0.01}), kind())
    with seeded(0):
        value = svi.evaluate_loss(x)
    expected = -elbo(pair.model, pair.guide, x, seed=0).sum()
    assert value == pytest.approx(float(expected), rel=1e-12)
    for _ in range(20):
        svi.step(x)
    assert -elbo(pair.model, pair.guide, x, seed=0).sum() < expected - N / 10
    together = kind(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    assert math.isfinite(together.loss(pair.model, pair.guide, x))


def test_new_images_are_drawn_from_what_is_left_of_given_ones():
    pair, x = made(prior="laplace"), draw(N, D)
    found = Predictive(pair.model, guide=pair.guide, num_samples=3)(x, observe=False)
    assert found["x"].shape == (3, N, D) and found["hidden"].shape == (3, N, P)
    assert bool((found["hidden"].sum(-1) == P // 2).all())
    away = (found["x"] - pair.decode(found["z"]).mean).flatten()
    score = away.square().mean() - 1  # of unit variance about what is decoded, seen or not
    assert abs(float(score)) / math.sqrt(2 / len(away)) < oracles.z_limit()
    assert pair.sample(4, seed=0).shape == pair.model(num_data=4).shape == (4, D)
    flat = made()
    for call in (lambda: flat.sample(2), lambda: Predictive(flat.model, num_samples=2)(x)):
        with pytest.raises(ValueError, match="a flat prior cannot be sampled"):
            call()


@pytest.mark.parametrize(
    "objective",
    [
        ELBO(3),
        ELBO(2, gradient="stl"),
        ELBO(2, gradient="score-loo"),
        IWAE(3),
        IWAE(3, gradient="dreg"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("covariance", ["delta", "diagonal"])
def test_every_objective_takes_it(objective, covariance):
    x = draw(N, D)
    if covariance == "delta":
        pair = made(share=0.75)
    else:
        encoder = mlp(2 * D, 2 * K, seed=0)
        how = {"missing": "zeros+mask", "hiding": HIDING}
        pair = VAE(
            decoder=mlp(K, D, seed=1),
            guide=AmortizedGuide(encoder, K, **how),
            likelihood=Gaussian(1.0),
            data_dim=D,
            latent_dim=K,
        ).double()
    fit = fit_svi(pair.model, pair.guide, x, steps=3, objective=objective, capture=False, seed=0)
    assert bool(fit.objective.isfinite().all())


def test_a_vae_whose_guide_hides_patches_bounds_log_p_of_them_and_is_measured_on_all():
    x, sizes = draw(N, D), {"data_dim": D, "latent_dim": K}
    pairs = []
    for hiding in (None, HIDING):
        guide = AmortizedGuide(mlp(2 * D, 2 * K, seed=0), K, missing="zeros+mask", hiding=hiding)
        nets = {"decoder": mlp(K, D, seed=1), "likelihood": Gaussian(1.0)}
        pairs.append(VAE(**nets, guide=guide, **sizes).double())
    whole, part = ((pair.model, pair.guide) for pair in pairs)
    assert elbo(*part, x, seed=0).mean() > elbo(*whole, x, seed=0).mean() + D / 4
    for measure in (
        lambda pair: log_likelihood(*pair, x, 50, seed=0).value,
        lambda pair: log_likelihood(*pair, x[:5], 50, refine=5, seed=0).value,
        lambda pair: log_likelihood(pair[0], None, x, 50, method="prior", seed=0).value,
        lambda pair: (
            log_likelihood(
                pair[0],
                None,
                x[:2],
                4,
                method="annealed",
                annealing=Annealing(num_temperatures=3, leapfrog=2),
                capture=False,
                seed=0,
            ).value
        ),
        lambda pair: impute(*pair, torch.where(x > 1, math.nan, x), 50, seed=0).mean,
        lambda pair: collapse(*pair, x, seed=0).kl,
        lambda pair: latent_means(*pair, x)["z"],
    ):
        torch.testing.assert_close(measure(part), measure(whole))


@pytest.mark.parametrize(
    "measure", [lambda *pair: log_likelihood(*pair), lambda *pair: gaps(*pair)]
)
def test_what_needs_a_density_says_that_there_is_none(measure):
    pair = made()
    with pytest.raises(ValueError, match="'z' of the model has a flat prior, which is no density"):
        measure(pair.model, pair.guide, draw(N, D))


def test_a_guide_that_hides_what_the_model_does_not_is_refused():
    guide = AmortizedGuide(mlp(D, K), K, covariance="delta", hiding=HIDING).double()
    other = Autoencoder.linear(D, K, seed=0).double()
    with pytest.raises(ValueError, match="site 'hidden' of the guide is not in the model"):
        elbo(other.model, guide, draw(N, D))


def test_one_set_of_patches_can_be_kept():
    pair, x = made(), draw(N, D)
    chosen = torch.tensor([True, False, False, True]).expand(N, P)
    fixed = poutine.condition(pair.guide, {"hidden": chosen})
    seen = ~HIDING.cells(chosen)
    code = poutine.trace(fixed).get_trace(x).nodes["z"]["value"]
    torch.testing.assert_close(code, pair.features(x, mask=seen), rtol=1e-12, atol=1e-12)
    model = poutine.condition(pair.model, {"hidden": chosen, "z": code})
    trace = poutine.trace(model).get_trace(x)
    error = (x - pair.reconstruct(x, mask=seen)).square()
    expected = -0.5 * torch.where(seen, 0.0, error + math.log(2 * math.pi)).sum(1)
    torch.testing.assert_close(trace.nodes["x"]["fn"].log_prob(x), expected)
    fewer = poutine.condition(pair.guide, {"hidden": torch.zeros(N, P)})
    with pytest.raises(ValueError, match="num_seen says that 2 of 4 patches are there, and a row"):
        fewer(x)


def test_noise_on_what_is_left():
    pair = plain("zeros", corruption=GaussianNoise(0.4))
    x = draw(N, D)
    with seeded(0):
        guide = poutine.trace(pair.guide).get_trace(x)
    hidden = HIDING.cells(guide.nodes["hidden"]["value"].bool())
    with seeded(0):
        HIDING.subsets(x).expand([N]).sample()
        noisy = pair.corruption(torch.where(hidden, 0.0, x))
    expected = pair.guide.encoder(torch.where(hidden, 0.0, noisy))
    torch.testing.assert_close(guide.nodes["z"]["value"], expected)


def test_convolutions_read_what_is_left():
    encoder = conv_encoder((4, 4, 6), 5, (3,), seed=0)
    pair = Autoencoder(
        encoder=encoder,
        decoder=mlp(5, D, seed=1),
        data_dim=D,
        latent_dim=5,
        missing="zeros+mask",
        hiding=HIDING,
    ).double()
    x = draw(N, D)
    assert log_weights(pair.model, pair.guide, x, 3).shape == (3, N)
    assert pair.features(x).shape == (N, 5)


def test_training_starts_from_the_means_of_the_columns_and_says_what_it_maximises():
    pair, x = made(), 3 + draw(N, D)
    with torch.no_grad():
        pair.decoder.last.weight.zero_()
    torch.testing.assert_close(pair.center(x).reconstruct(x), x.mean(0).expand(N, D))
    fit = fit_svi(pair.model, pair.guide, x, x_val=x[:7], steps=3, capture=False, seed=0)
    assert "log p of x in hidden patches given f(x) of the others" in repr(fit)
    assert "no bound on log p(x)" in repr(fit)


def test_it_learns_what_patches_say_of_one_another():
    # All patches of an image are one patch, so any two say all of the others.
    part = draw(200, D // P)
    x = HIDING.join(part[:, None].expand(-1, P, -1))
    pair = made(width=16, heads=2, decoder_width=16, depth=1)
    fit_svi(pair.model, pair.guide, x, steps=120, lr=1e-2, capture=False, seed=0)
    new = HIDING.join(draw(50, D // P, seed=5)[:, None].expand(-1, P, -1))
    seen = HIDING.visible(50, seed=0)
    error = (pair.reconstruct(new, mask=seen) - new)[~seen].square().mean()
    assert error < 0.35  # 1 by the means


@pytest.mark.parametrize(
    "how",
    [
        {"likelihood": Gaussian("network"), "prior": "laplace", "penalty": 2.0},
        {"likelihood": Categorical(3), "corruption": GaussianNoise(0.1), "share": 0.25},
    ],
    ids=["network", "categories"],
)
def test_a_saved_one_comes_back_and_copies_train_alone(how, tmp_path):
    pair, x = made(**how), (draw(N, D) > 0).double()
    again = load(save(pair, tmp_path))
    assert again.config() == pair.config() and again.hiding == pair.hiding
    assert again.corruption == pair.corruption
    values = [elbo(each.model, each.guide, x, seed=0) for each in (pair, again)]
    assert torch.equal(*values) and torch.equal(pair.features(x), again.features(x))
    copied = copy.deepcopy(pair)
    fit_svi(copied.model, copied.guide, x, steps=2, lr=0.1, capture=False, seed=0)
    assert torch.equal(elbo(pair.model, pair.guide, x, seed=0), values[0])
    assert not torch.equal(elbo(copied.model, copied.guide, x, seed=0), values[0])


def test_a_seed_repeats_the_networks():
    state, again, other = (made(seed=s).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert not torch.equal(state["decoder.positions"], other["decoder.positions"])


# Captured


@pytest.mark.parametrize(
    ("objective", "holes"),
    [
        (ELBO(), True),
        pytest.param(ELBO(), False, marks=pytest.mark.slow),
        pytest.param(IWAE(3), True, marks=pytest.mark.slow),
    ],
    ids=repr,
)
def test_recorded_steps_are_the_eager_ones(objective, holes):
    def pair():
        one = made(width=4, depth=1, decoder_width=4)
        return one.model, one.guide

    x = draw(24, D)
    mask = draw(24, D, seed=1) < 1.5 if holes else None
    agree(both_ways(pair, x, objective=objective, mask=mask))


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("scale", [1.0, "shared"])
def test_captured_steps_are_the_eager_ones(scale):
    x, ends = draw(N, D), []
    for capture in (False, True):
        pair = made(likelihood=Gaussian(scale), prior="laplace")
        fit = fit_svi(pair.model, pair.guide, x, steps=20, lr=0.01, capture=capture, seed=0)
        assert fit.execution.startswith("captured") is capture
        ends.append(elbo(pair.model, pair.guide, x, seed=0))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-9)


# What is refused


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (
            {"image_shape": (8, 8)},
            r"image_shape must be \(channels, height, width\); got \(8",
        ),
        ({"patch": 3}, "image_shape must be a whole number of patches high and wide; 8 x 8 pix"),
        ({"patch": 0}, "patch must be a whole number >= 1; got 0"),
        ({"patch": (2, 2, 2)}, r"patch must be a side in pixels, or \(height, width\); got"),
        ({"share": 0.01}, "share must hide some patches and leave some; share=0.01 hides 0 of 16"),
        ({"share": 1.0}, "share must hide some patches and leave some; share=1.0 hides 16 of 16"),
        ({"heads": 3}, "heads must divide the width of a token; 3 do not divide 64"),
        ({"heads": 0}, "heads must be a whole number >= 1; got 0"),
        ({"depth": 0}, "depth must be a whole number >= 1; got 0"),
        ({"width": 0}, "width must be a whole number >= 1; got 0"),
        ({"decoder_width": 6}, "heads must divide the width of a token; 4 do not divide 6"),
        ({"likelihood": Multinomial()}, "hiding= needs a likelihood that can score a part of x; "),
        ({"prior": "wide"}, "prior must be one of 'flat'"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        Autoencoder.masked(**({"image_shape": (1, 8, 8), "patch": 2} | arguments))


def test_parts_that_do_not_fit_are_refused():
    parts = {"decoder": mlp(K, 20), "data_dim": 20, "latent_dim": K}
    with pytest.raises(ValueError, match=r"images of shape \(2, 4, 6\), 48 entries; data_dim is"):
        Autoencoder(encoder=mlp(20, K), **parts, hiding=HIDING)
    guide = AmortizedGuide(mlp(20, K), K, covariance="delta")
    with pytest.raises(ValueError, match="hiding= is for the guide that is made from encoder="):
        Autoencoder(guide=guide, **parts, hiding=HIDING)
    network = PatchTransformer(SHAPE, PATCH, 8, 1, 2, seed=0).double()
    with pytest.raises(ValueError, match="rows must be 48 entries and a mask of as many; they ha"):
        network(draw(N, D))
    with pytest.raises(ValueError, match="num_seen says that 1 of 4 patches are there, and a row"):
        network(torch.ones(3, 2 * D).double(), num_seen=1)
    with pytest.raises(ValueError, match=r"no patch is wholly observed: \[0, 1, 2\]; drop them"):
        network(torch.zeros(3, 2 * D).double())
    sizes = {"data_dim": D, "latent_dim": network.out_dim, "decoder": nn.Identity()}
    finer = HiddenPatches(SHAPE, 1, share=0.25)
    pair = Autoencoder(encoder=network, **sizes, missing="zeros", hiding=finer)
    with pytest.raises(ValueError, match=r"Use missing='zeros\+mask'"):
        pair.guide(draw(N, D))


# Digits


@pytest.mark.slow
def test_digits_against_the_exact_conditional_mean_of_ppca(capsys):
    """Printed, whichever wins; that both beat the means is what must be true."""
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    x = torch.as_tensor(digits(), dtype=torch.float32)[order]
    x, x_val, x_test = x[:1297], x[1297:1497], x[1497:]
    hiding = HiddenPatches((1, 8, 8), 2)

    def error(fill, rows, seeds):
        masks = [hiding.visible(len(rows), seed=seed) for seed in seeds]
        squares = [torch.where(m, 0.0, fill(rows, m) - rows).square().sum(1) for m in masks]
        return torch.stack(squares).mean(0) / (64 - 16)

    scores = {}
    for latent_dim in range(1, 61, 3):
        ppca = PPCA.like(x, latent_dim)
        fit_closed_form(ppca, x)
        filled = error(lambda r, m, p=ppca: p.impute(r, mask=m).mean, x_val, range(4))
        scores[latent_dim] = float(filled.mean()), ppca
    best = min(scores, key=lambda k: scores[k][0])
    masked = Autoencoder.masked((1, 8, 8), 2, width=32, depth=2, decoder_width=32, seed=0)
    how = {"epochs": 150, "batch_size": 100, "lr": 2e-3, "capture": False, "seed": 0}
    fit_svi(masked.center(x).model, masked.guide, x, x_val=x_val, **how)
    seeds = range(100, 110)
    ours = error(lambda r, m: masked.reconstruct(r, mask=m), x_test, seeds)
    exact = error(lambda r, m: scores[best][1].impute(r, mask=m).mean, x_test, seeds)
    means = error(lambda r, m: x.mean(0).expand_as(r), x_test, seeds)
    difference = ours - exact
    with capsys.disabled():
        print(
            f"\nsquared error a hidden cell: column means {means.mean():.5f}, PPCA (K = {best}) "
            f"{exact.mean():.5f}, masked autoencoder {ours.mean():.5f}; difference "
            f"{difference.mean():+.5f} +- {difference.std() / len(x_test) ** 0.5:.5f}"
        )
    assert max(float(ours.mean()), float(exact.mean())) < float(means.mean())
