"""Masked autoencoders: patches, hidden subsets, scored entries, and encoder inputs."""

import copy
import itertools
import math
from dataclasses import asdict

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from scipy.special import erf
from torch import nn

import oracles
from captured import assert_equal, both_fits
from draws import draw
from ppl_vae import AmortizedGuide, digits, fit_closed_form, fit_svi, mlp
from ppl_vae.core.state import eval_mode, seeded, validation
from ppl_vae.evaluation import Annealing, collapse, gaps, impute, log_likelihood
from ppl_vae.evaluation.latent_space.traversal import interpolate
from ppl_vae.evaluation.prediction.predictive import decode, encode, latent_means, reconstruct
from ppl_vae.inference import best_codes
from ppl_vae.likelihoods import Bernoulli, Categorical, Gaussian, Multinomial, OptimalGaussian
from ppl_vae.models import PPCA, VAE, Autoencoder, load, save
from ppl_vae.networks import GaussianNoise, HiddenPatches, PatchDecoder, PatchTransformer
from ppl_vae.networks.mlp_conv import conv_encoder
from ppl_vae.networks.patches import Patches, UniformSubsets
from ppl_vae.objectives import ELBO, IWAE, elbo, log_weights

GRIDS = [((1, 8, 8), 2), ((3, 4, 6), (2, 3)), ((2, 6, 4), (3, 1)), ((1, 1, 6), (1, 2))]
SHAPE, PATCH, D, P = (2, 4, 6), (2, 3), 48, 4
PATCH_MASK = HiddenPatches(SHAPE, PATCH, share=0.5)
N, K = 30, 5


def made(**options):
    arguments = {"width": 8, "depth": 2, "heads": 2, "decoder_width": 6} | {
        "share": 0.5,
        "seed": 0,
    }
    return Autoencoder.masked(SHAPE, PATCH, **(arguments | options)).double()


def plain(missing="zeros+mask", **options):
    """A masked autoencoder of multilayer perceptrons."""
    inputs = {"zeros": D, "zeros+mask": 2 * D}[missing]
    width = D * options.get("likelihood", Gaussian(1.0)).outputs_per_dim
    nets = {"encoder": mlp(inputs, K, (7,), seed=0), "decoder": mlp(K, width, (7,), seed=1)}
    sizes = {"data_dim": D, "latent_dim": K}
    return Autoencoder(**nets, **sizes, missing=missing, patch_mask=PATCH_MASK, **options).double()


def both_traces(pair, x, seed=0, **arguments):
    with seeded(seed):
        guide = poutine.trace(pair.guide).get_trace(x, **arguments)
        model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(x, **arguments)
    return guide.nodes, model.nodes


def masked_cv(marks, image_shape=SHAPE, patch=PATCH):
    """The entries of marked patches of one image, by a loop over pixels."""
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
    assert (grid.num_patches, grid.patch_dim) == (len(blocks), len(blocks[0]))
    assert grid.num_patches * grid.patch_dim == grid.data_dim == channels * height * width


@pytest.mark.parametrize(("shape", "patch"), GRIDS)
def test_cutting_is_a_permutation_that_joining_undoes(shape, patch):
    grid = Patches(shape, patch)
    rows = draw(2, 5, grid.data_dim)  # with a further dimension on the left
    cut = grid.cut(rows)
    assert cut.shape == (2, 5, grid.num_patches, grid.patch_dim)
    assert torch.equal(cut.flatten(2).sort().values, rows.sort().values)
    assert torch.equal(grid.join(cut), rows)
    assert torch.equal(cut[1, 3], grid.cut(rows[1, 3]))


@pytest.mark.parametrize(("shape", "patch"), GRIDS)
def test_outputs_of_an_entry_stay_adjacent(shape, patch):
    grid = Patches(shape, patch)
    outputs = draw(3, grid.num_patches, grid.patch_dim, 2)
    rows = grid.join(outputs.flatten(2), 2).unflatten(1, (grid.data_dim, 2))
    for place in range(2):
        assert torch.equal(rows[..., place], grid.join(outputs[..., place]))


@pytest.mark.parametrize(("shape", "patch"), GRIDS)
def test_entries_of_patches_agree_with_a_loop_over_pixels(shape, patch):
    grid = Patches(shape, patch)
    marks = draw(6, grid.num_patches) > 0
    marks[0, 0] = True
    cells = grid.to_entries(marks)
    for row, cell in zip(marks.numpy(), cells, strict=True):
        np.testing.assert_array_equal(cell, masked_cv(row, shape, grid.sides))
    assert torch.equal(grid.fully_observed(cells), marks)
    incomplete = cells.clone()
    incomplete[0, cells[0].nonzero()[0]] = False  # one entry less
    lost = (grid.fully_observed(incomplete) != marks).nonzero()
    assert lost.tolist() == [[0, int(marks[0].nonzero()[0])]]


# Hidden subsets


def test_all_subsets_are_equally_probable():
    subsets = UniformSubsets(5, 2, torch.zeros(()).double())
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


def test_subsets_are_drawn_per_row_and_scored_in_any_batch():
    subsets = UniformSubsets(6, 2, torch.zeros(())).expand([4, 7])
    with seeded(0):
        value = subsets.rsample(torch.Size([3]))
    assert value.shape == (3, 4, 7, 6) and value.dtype == torch.float32
    assert len(value.reshape(-1, 6).unique(dim=0)) > 10
    assert subsets.log_prob(value).shape == (3, 4, 7)
    assert subsets.log_prob(value[0, 0, 0].bool()).shape == (4, 7)
    with pytest.raises(ValueError, match="within the support"), validation(True):
        UniformSubsets(6, 2, torch.zeros(()), validate_args=True).log_prob(2 * value)


def test_the_number_of_hidden_patches_is_fixed_and_the_set_is_random():
    patch_mask = HiddenPatches([1, 8, 8], 2)
    assert (patch_mask.num_patches, patch_mask.num_hidden, patch_mask.num_visible) == (16, 12, 4)
    assert (
        patch_mask == HiddenPatches((1, 8, 8), (2, 2), 0.75) == HiddenPatches(**asdict(patch_mask))
    )
    observed = patch_mask.visible(50, seed=0)
    assert observed.shape == (50, 64) and bool(
        (patch_mask.fully_observed(observed).sum(1) == 4).all()
    )
    assert bool((observed.sum(1) == 16).all())
    assert torch.equal(observed, patch_mask.visible(50, seed=0))
    assert not torch.equal(observed, patch_mask.visible(50, seed=1))


# Losses against their formulas


@pytest.mark.parametrize("missing", ["zeros", "zeros+mask"])
@pytest.mark.parametrize("has_missing", [False, True])
def test_the_negative_log_joint_is_the_loss_on_hidden_patches_plus_a_constant(
    missing, has_missing
):
    sigma = 0.7
    pair = plain(missing, likelihood=Gaussian(sigma), prior="laplace", penalty=0.3)
    x, given_mask = draw(N, D), torch.ones(N, D, dtype=torch.bool)
    arguments = {}
    if has_missing:
        given_mask = draw(N, D, seed=1) < 0.8
        arguments = {"mask": given_mask}
    guide, model = both_traces(pair, torch.where(given_mask, x, 7.0), **arguments)
    hidden = torch.from_numpy(np.stack([masked_cv(r) for r in guide["hidden"]["value"]]))
    assert bool((hidden.sum(1) == D / 2).all())
    observed = ~hidden & given_mask
    inputs = torch.where(observed, x, 0.0)
    inputs = inputs if missing == "zeros" else torch.cat([inputs, observed.double()], 1)
    codes = pair.guide.encoder(inputs)
    squares = (x - pair.decoder(codes)).square() / (2 * sigma**2)
    scored = hidden & given_mask
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
    given = torch.where(given_mask, x, math.nan)
    found = elbo(pair.model, pair.guide, given, seed=0)
    torch.testing.assert_close(found, expected, **close)
    weights = log_weights(pair.model, pair.guide, given, seed=0)[0]
    torch.testing.assert_close(weights.detach(), expected, **close)


def test_each_draw_under_a_plate_of_samples_hides_its_own_patches():
    pair, x, S = made(), draw(N, D), 3
    with seeded(0), pyro.plate("draws", S, dim=-2):
        guide = poutine.trace(pair.guide).get_trace(x)
        model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(x)
    hidden = guide.nodes["hidden"]["value"]
    assert hidden.shape == (S, N, P) and len(hidden[:, 0].unique(dim=0)) > 1
    for s in range(S):
        observed = ~PATCH_MASK.to_entries(hidden[s].bool())
        codes = pair.guide.encoder(
            torch.cat([torch.where(observed, x, 0.0), observed.double()], 1)
        )
        torch.testing.assert_close(guide.nodes["z"]["value"][s], codes)
        cells = -0.5 * ((x - pair.decoder(codes)).square() + math.log(2 * math.pi))
        expected = torch.where(observed, 0.0, cells).sum(1)
        site = model.nodes["x"]
        torch.testing.assert_close(site["fn"].log_prob(site["value"])[s], expected)
    several = log_weights(pair.model, pair.guide, x, 400, seed=0).detach()
    assert several.shape == (400, N)
    average = elbo(pair.model, pair.guide, x, num_samples=400, seed=1)
    score = (several.mean(0) - average) / (several.std(0) * math.sqrt(2 / 400))
    assert float(score.abs().max()) < oracles.z_limit(N)


@pytest.mark.parametrize("likelihood", [Bernoulli, lambda: Gaussian("network")])
def test_any_elementwise_likelihood_scores_hidden_patches(likelihood):
    pair, x = made(likelihood=likelihood()), (draw(N, D) > 0).double()
    guide, model = both_traces(pair, x)
    observed = ~PATCH_MASK.to_entries(guide["hidden"]["value"].bool())
    cells = pair.conditional(guide["z"]["value"]).base_dist.log_prob(x)
    expected = torch.where(observed, 0.0, cells).sum(1)
    torch.testing.assert_close(model["x"]["fn"].log_prob(x), expected)


def test_an_optimal_scale_is_computed_from_hidden_entries():
    pair, x = made(likelihood=OptimalGaussian()), draw(N, D)
    guide, model = both_traces(pair, x)
    hidden = PATCH_MASK.to_entries(guide["hidden"]["value"].bool())
    error = x - pair.decoder(guide["z"]["value"])
    scale = error[hidden].square().mean().sqrt()
    expected = -0.5 * ((error / scale).square() + torch.log(2 * math.pi * scale**2))
    expected = torch.where(hidden, expected, 0.0).sum(1)
    torch.testing.assert_close(model["x"]["fn"].log_prob(x), expected)


# Encoder inputs


@pytest.mark.parametrize("make", [made, plain], ids=["transformer", "perceptron"])
def test_the_code_does_not_depend_on_hidden_entries(make):
    pair, x = make(), draw(N, D)
    first, _ = both_traces(pair, x.requires_grad_())
    hidden = PATCH_MASK.to_entries(first["hidden"]["value"].bool())
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


def encoded(network, row, observed, heads=2):
    """The code of one image from its completely observed patches."""
    w, grid = weights_of(network), network.patches
    patches, whole = grid.cut(row).numpy(), grid.fully_observed(observed).numpy()
    tokens = affine(patches[whole], w, "embed") + w["positions"][whole]
    for layer in network.layers:
        tokens = attended(tokens, layer, heads)
    code = np.zeros(w["positions"].shape)
    code[whole] = normed(tokens, w, "norm")
    return code.ravel()


@pytest.mark.parametrize("training", [True, False])
def test_the_encoder_agrees_with_a_reference_transformer_on_visible_patches(training):
    network = PatchTransformer(SHAPE, PATCH, 8, 2, 2, seed=0).double().train(training)
    x, patches = draw(N, D), draw(N, P, seed=1) > 0
    patches[:, 2] |= ~patches.any(1)  # the numbers of patches differ, and none is 0
    observed = network.patches.to_entries(patches)
    observed[0, 0] = False  # a missing value makes its patch incomplete
    assert len(set(network.patches.fully_observed(observed).sum(1).tolist())) > 2
    expected = [encoded(network, *pair) for pair in zip(x, observed, strict=True)]
    rows = torch.cat([torch.where(observed, x, 0.0), observed.double()], 1)
    with torch.set_grad_enabled(training):
        np.testing.assert_allclose(network(rows).detach(), expected, rtol=1e-10, atol=1e-12)
        few = network.patches.fully_observed(observed).sum(1) <= 2
        codes = network(rows[few], num_visible=2).detach()
    np.testing.assert_allclose(codes, np.array(expected)[few], rtol=1e-10, atol=1e-12)


def test_the_decoder_agrees_with_a_reference_transformer():
    network = PatchDecoder(
        SHAPE, PATCH, code_width=3, width=8, depth=2, heads=4, outputs_per_dim=2, seed=0
    ).double()
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


def test_only_visible_patches_are_computed():
    pair, sizes = made(share=0.75), []
    layers = pair.guide.encoder.layers
    layers[0].register_forward_hook(lambda module, args, out: sizes.append(args[0].shape))
    x = draw(N, D)
    elbo(pair.model, pair.guide, x)
    log_weights(pair.model, pair.guide, x)
    pair.features(x)
    assert sizes == [(N, 1, 8), (N, 1, 8), (N, 4, 8)]


def test_rows_with_missing_values_train_and_rows_without_visible_patches_do_no_harm():
    pair, x = made(likelihood=Gaussian(1.0)), draw(N, D)
    x[:, :2] = math.nan  # the first patch is never complete
    x[: N // 2, D // 2 - 4 : D // 2] = math.nan  # nor is the last, for half of the rows
    guide, _ = both_traces(pair, x.nan_to_num(), seed=1, mask=~x.isnan())
    codes = guide["z"]["value"]
    nothing = (codes == 0).all(1)
    assert bool(nothing.any()) and not bool(nothing.all())
    weights = log_weights(pair.model, pair.guide, x, seed=1)
    weights.sum().backward()
    assert bool(weights.isfinite().all())
    assert all(bool(p.grad.isfinite().all()) for p in pair.parameters())
    fit = fit_svi(pair.model, pair.guide, x, steps=5, batch_size=10, capture=False, seed=0)
    assert fit.steps == 5 and bool(fit.objective.isfinite().all())
    incomplete = draw(N, D)
    incomplete[3] = torch.where(
        pair.patch_mask.to_entries(torch.ones(1, P)) > 0, incomplete[3], 0.0
    )
    incomplete[3, [0, 3, 12, 15]] = math.nan
    with pytest.raises(ValueError, match=r"rows without a fully observed patch: \[3\]"):
        pair.features(incomplete)


# Whole images


@pytest.mark.parametrize("make", [made, plain], ids=["transformer", "perceptron"])
def test_features_are_computed_from_whole_images(make):
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
    assert pair.patch_mask == PATCH_MASK  # restored


def test_patches_are_hidden_again_after_an_evaluation_that_fails():
    pair = made()
    pair.eval()
    for program in (pair.model, pair.guide, poutine.scale(pair.guide, 1.0)):
        with pytest.raises(KeyError), eval_mode(program):
            assert pair.patch_mask is None
            assert "hidden" not in poutine.trace(pair.guide).get_trace(draw(N, D)).nodes
            raise KeyError
        assert pair.patch_mask == PATCH_MASK and not pair.training


def test_missing_patches_are_predicted_from_observed_ones():
    pair, x = made(), draw(N, D)
    observed = PATCH_MASK.visible(N, seed=0)
    inputs = torch.cat([torch.where(observed, x, 0.0), observed.double()], 1)
    expected = pair.decoder(pair.guide.encoder(inputs)).detach()
    torch.testing.assert_close(pair.reconstruct(x, mask=observed), expected)
    torch.testing.assert_close(pair.reconstruct(torch.where(observed, x, math.nan)), expected)
    codes = pair.features(x, mask=observed).unflatten(1, (P, 8))
    assert torch.equal((codes == 0).all(2), ~PATCH_MASK.fully_observed(observed))


def test_best_codes_use_all_observed_entries():
    pair, x = plain(), draw(N, D)
    found = best_codes(pair, x, max_iterations=5)
    expected = pair.decode(found.codes).log_prob(x)
    torch.testing.assert_close(found.log_joint.detach(), expected)


# As a pair


@pytest.mark.parametrize("kind", [Trace_ELBO, TraceMeanField_ELBO])
def test_pyros_losses_agree_and_train_the_pair(kind):
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


def test_new_images_are_drawn_given_the_visible_patches():
    pair, x = made(prior="laplace"), draw(N, D)
    found = Predictive(pair.model, guide=pair.guide, num_samples=3)(x, observe=False)
    assert found["x"].shape == (3, N, D) and found["hidden"].shape == (3, N, P)
    assert bool((found["hidden"].sum(-1) == P // 2).all())
    away = (found["x"] - pair.decode(found["z"]).mean).flatten()
    score = away.square().mean() - 1  # of unit variance about the decoded mean, visible or not
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
def test_every_objective_accepts_a_masked_pair(objective, covariance):
    x = draw(N, D)
    if covariance == "delta":
        pair = made(share=0.75)
    else:
        encoder = mlp(2 * D, 2 * K, seed=0)
        pair = VAE(
            decoder=mlp(K, D, seed=1),
            guide=AmortizedGuide(encoder, K, missing="zeros+mask", patch_mask=PATCH_MASK),
            likelihood=Gaussian(1.0),
            data_dim=D,
            latent_dim=K,
        ).double()
    fit = fit_svi(pair.model, pair.guide, x, steps=3, objective=objective, capture=False, seed=0)
    assert bool(fit.objective.isfinite().all())


def test_a_vae_with_hidden_patches_bounds_their_log_p_and_is_evaluated_on_all_entries():
    x, sizes = draw(N, D), {"data_dim": D, "latent_dim": K}
    pairs = []
    for patch_mask in (None, PATCH_MASK):
        guide = AmortizedGuide(
            mlp(2 * D, 2 * K, seed=0), K, missing="zeros+mask", patch_mask=patch_mask
        )
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
def test_evaluations_that_need_a_density_are_refused(measure):
    pair = made()
    with pytest.raises(ValueError, match="'z' of the model has a flat prior, which is no density"):
        measure(pair.model, pair.guide, draw(N, D))


def test_a_guide_that_hides_patches_of_a_plain_model_is_refused():
    guide = AmortizedGuide(mlp(D, K), K, covariance="delta", patch_mask=PATCH_MASK).double()
    other = Autoencoder.linear(D, K, seed=0).double()
    with pytest.raises(ValueError, match="site 'hidden' of the guide is not in the model"):
        elbo(other.model, guide, draw(N, D))


def test_hidden_patches_can_be_conditioned_on():
    pair, x = made(), draw(N, D)
    chosen = torch.tensor([True, False, False, True]).expand(N, P)
    fixed = poutine.condition(pair.guide, {"hidden": chosen})
    observed = ~PATCH_MASK.to_entries(chosen)
    code = poutine.trace(fixed).get_trace(x).nodes["z"]["value"]
    torch.testing.assert_close(code, pair.features(x, mask=observed), rtol=1e-12, atol=1e-12)
    model = poutine.condition(pair.model, {"hidden": chosen, "z": code})
    trace = poutine.trace(model).get_trace(x)
    error = (x - pair.reconstruct(x, mask=observed)).square()
    expected = -0.5 * torch.where(observed, 0.0, error + math.log(2 * math.pi)).sum(1)
    torch.testing.assert_close(trace.nodes["x"]["fn"].log_prob(x), expected)
    fewer = poutine.condition(pair.guide, {"hidden": torch.zeros(N, P)})
    with pytest.raises(ValueError, match="num_visible is 2, but a row has"):
        fewer(x)


def test_noise_is_added_to_visible_entries():
    pair = plain("zeros", corruption=GaussianNoise(0.4))
    x = draw(N, D)
    with seeded(0):
        guide = poutine.trace(pair.guide).get_trace(x)
    hidden = PATCH_MASK.to_entries(guide.nodes["hidden"]["value"].bool())
    with seeded(0):
        PATCH_MASK.subsets(x).expand([N]).sample()
        noisy = pair.corruption(torch.where(hidden, 0.0, x))
    expected = pair.guide.encoder(torch.where(hidden, 0.0, noisy))
    torch.testing.assert_close(guide.nodes["z"]["value"], expected)


def test_a_convolutional_encoder_reads_visible_entries():
    encoder = conv_encoder((4, 4, 6), 5, (3,), seed=0)
    pair = Autoencoder(
        encoder=encoder,
        decoder=mlp(5, D, seed=1),
        data_dim=D,
        latent_dim=5,
        missing="zeros+mask",
        patch_mask=PATCH_MASK,
    ).double()
    x = draw(N, D)
    assert log_weights(pair.model, pair.guide, x, 3).shape == (3, N)
    assert pair.features(x).shape == (N, 5)


def test_training_starts_at_the_column_means_and_notes_the_objective():
    pair, x = made(), 3 + draw(N, D)
    with torch.no_grad():
        pair.decoder.last.weight.zero_()
    torch.testing.assert_close(pair.center(x).reconstruct(x), x.mean(0).expand(N, D))
    fit = fit_svi(pair.model, pair.guide, x, x_val=x[:7], steps=3, capture=False, seed=0)
    assert "log p of x in hidden patches given f(x) of the visible ones" in repr(fit)
    assert "no bound on log p(x)" in repr(fit)


@pytest.mark.slow
def test_dependence_between_patches_is_learned():
    # All patches of an image are equal, so any two determine all others.
    part = draw(200, D // P)
    x = PATCH_MASK.join(part[:, None].expand(-1, P, -1))
    pair = made(width=16, heads=2, decoder_width=16, depth=1)
    fit_svi(pair.model, pair.guide, x, steps=120, lr=1e-2, capture=False, seed=0)
    new = PATCH_MASK.join(draw(50, D // P, seed=5)[:, None].expand(-1, P, -1))
    observed = PATCH_MASK.visible(50, seed=0)
    error = (pair.reconstruct(new, mask=observed) - new)[~observed].square().mean()
    assert error < 0.35  # predicting the means gives 1


@pytest.mark.parametrize(
    "options",
    [
        {"likelihood": Gaussian("network"), "prior": "laplace", "penalty": 2.0},
        {"likelihood": Categorical(3), "corruption": GaussianNoise(0.1), "share": 0.25},
    ],
    ids=["network", "categories"],
)
def test_a_loaded_masked_autoencoder_equals_the_saved_one_and_trains_independently(
    options, tmp_path
):
    pair, x = made(**options), (draw(N, D) > 0).double()
    again = load(save(pair, tmp_path))
    assert again.config() == pair.config() and again.patch_mask == pair.patch_mask
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
    ("objective", "has_missing"),
    [
        pytest.param(ELBO(), True, marks=pytest.mark.slow),
        pytest.param(ELBO(), False, marks=pytest.mark.slow),
        pytest.param(IWAE(3), True, marks=pytest.mark.slow),
    ],
    ids=repr,
)
def test_recorded_steps_equal_eager_steps(objective, has_missing):
    def pair():
        one = made(width=4, depth=1, decoder_width=4)
        return one.model, one.guide

    x = draw(24, D)
    mask = draw(24, D, seed=1) < 1.5 if has_missing else None
    assert_equal(both_fits(pair, x, objective=objective, mask=mask))


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("scale", [1.0, "shared"])
def test_captured_steps_equal_eager_steps(scale):
    x, ends = draw(N, D), []
    for capture in (False, True):
        pair = made(likelihood=Gaussian(scale), prior="laplace")
        fit = fit_svi(pair.model, pair.guide, x, steps=20, lr=0.01, capture=capture, seed=0)
        assert fit.execution.startswith("compiled") is capture
        ends.append(elbo(pair.model, pair.guide, x, seed=0))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-9)


# Refused arguments


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (
            {"image_shape": (8, 8)},
            r"image_shape must be \(channels, height, width\); got \(8",
        ),
        ({"patch": 3}, "patches must tile the image; 8 x 8 pixels are not"),
        ({"patch": 0}, "patch must be a whole number >= 1; got 0"),
        ({"patch": (2, 2, 2)}, r"patch must be a side in pixels, or \(height, width\); got"),
        ({"share": 0.01}, "share must hide some but not all patches; share=0.01 hides 0 of 16"),
        ({"share": 1.0}, "share must hide some but not all patches; share=1.0 hides 16 of 16"),
        ({"heads": 3}, "heads must divide the width of a token; 3 do not divide 64"),
        ({"heads": 0}, "heads must be a whole number >= 1; got 0"),
        ({"depth": 0}, "depth must be a whole number >= 1; got 0"),
        ({"width": 0}, "width must be a whole number >= 1; got 0"),
        ({"decoder_width": 6}, "heads must divide the width of a token; 4 do not divide 6"),
        (
            {"likelihood": Multinomial()},
            "patch_mask= needs a likelihood that can score a subset of the entries of x; ",
        ),
        ({"prior": "wide"}, "prior must be one of 'flat'"),
    ],
)
def test_incompatible_arguments_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        Autoencoder.masked(**({"image_shape": (1, 8, 8), "patch": 2} | arguments))


def test_incompatible_parts_are_refused():
    parts = {"decoder": mlp(K, 20), "data_dim": 20, "latent_dim": K}
    with pytest.raises(ValueError, match=r"images of shape \(2, 4, 6\), 48 entries; data_dim is"):
        Autoencoder(encoder=mlp(20, K), **parts, patch_mask=PATCH_MASK)
    guide = AmortizedGuide(mlp(20, K), K, covariance="delta")
    with pytest.raises(
        ValueError, match="patch_mask= is for the guide that is made from encoder="
    ):
        Autoencoder(guide=guide, **parts, patch_mask=PATCH_MASK)
    network = PatchTransformer(SHAPE, PATCH, 8, 1, 2, seed=0).double()
    with pytest.raises(ValueError, match="rows must have 48 entries and a mask"):
        network(draw(N, D))
    with pytest.raises(ValueError, match="num_visible is 1, but a row has"):
        network(torch.ones(3, 2 * D).double(), num_visible=1)
    with pytest.raises(
        ValueError, match=r"rows without a fully observed patch: \[0, 1, 2\]; drop them"
    ):
        network(torch.zeros(3, 2 * D).double())
    sizes = {"data_dim": D, "latent_dim": network.out_dim, "decoder": nn.Identity()}
    finer = HiddenPatches(SHAPE, 1, share=0.25)
    pair = Autoencoder(encoder=network, **sizes, missing="zeros", patch_mask=finer)
    with pytest.raises(ValueError, match=r"Use missing='zeros\+mask'"):
        pair.guide(draw(N, D))


# Digits


@pytest.mark.slow
def test_digits_against_the_exact_conditional_mean_of_ppca(capsys):
    """Prints both errors; both must be below that of the column means."""
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    x = torch.as_tensor(digits(), dtype=torch.float32)[order]
    x, x_val, x_test = x[:1297], x[1297:1497], x[1497:]
    patch_mask = HiddenPatches((1, 8, 8), 2)

    def error(fill, rows, seeds):
        masks = [patch_mask.visible(len(rows), seed=seed) for seed in seeds]
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
    fit_svi(
        masked.center(x).model,
        masked.guide,
        x,
        x_val=x_val,
        epochs=150,
        batch_size=100,
        lr=2e-3,
        capture=False,
        seed=0,
    )
    seeds = range(100, 110)
    ours = error(lambda r, m: masked.reconstruct(r, mask=m), x_test, seeds)
    exact = error(lambda r, m: scores[best][1].impute(r, mask=m).mean, x_test, seeds)
    means = error(lambda r, m: x.mean(0).expand_as(r), x_test, seeds)
    difference = ours - exact
    with capsys.disabled():
        print(
            f"\nsquared error a hidden cell: column means {means.mean():.5f}, PPCA (K = {best}) "
            f"{exact.mean():.5f}, masked autoencoder {ours.mean():.5f}; difference "
            f"{difference.mean():+.5f} ± {difference.std() / len(x_test) ** 0.5:.5f}"
        )
    assert max(float(ours.mean()), float(exact.mean())) < float(means.mean())
