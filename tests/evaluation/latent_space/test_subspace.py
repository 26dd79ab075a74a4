"""Two PPCA models compared up to rotations of their loadings."""

import json
from types import SimpleNamespace

import numpy as np
import oracles
import pytest
import torch
from scipy.linalg import orthogonal_procrustes, subspace_angles

from ppl_vae.evaluation.latent_space.subspace import Subspace, subspace
from ppl_vae.inference.em.fit import fit_closed_form, fit_em
from ppl_vae.models.ppca import PPCA

D, K = 8, 3


def parameters(seed, K=K, D=D, noise=None):
    """(loc, loadings, noise variance) in general position."""
    rng = np.random.default_rng(seed)
    noise = rng.uniform(0.3, 2.0) if noise is None else noise
    return rng.normal(size=D), rng.normal(size=(D, K)), noise


def model(loc, loadings, noise, dtype=torch.float64):
    scale = torch.tensor(noise**0.5, dtype=torch.float64)
    return PPCA.from_parameters(torch.tensor(loadings, dtype=dtype), torch.tensor(loc), scale)


def degrees(radians):
    return np.rad2deg(radians)


@pytest.mark.parametrize("seed", range(5))
def test_the_angles_agree_with_scipy(seed):
    first, second = parameters(seed), parameters(seed + 50)
    result = subspace(model(*first), model(*second))
    expected = degrees(subspace_angles(first[1], second[1]))
    np.testing.assert_allclose(result.angles, expected, rtol=1e-10)
    assert (result.angles.diff() <= 0).all()
    assert result.largest_angle == float(result.angles[0])


def test_a_known_angle():
    angle = 0.3
    first = np.zeros((4, 2))
    first[0, 0] = first[1, 1] = 2.0
    second = np.zeros((4, 2))
    second[0, 0], second[1, 1], second[2, 1] = 5.0, np.cos(angle), np.sin(angle)
    result = subspace(model(np.zeros(4), first, 1.0), model(np.zeros(4), second, 1.0))
    np.testing.assert_allclose(result.angles, [degrees(angle), 0], atol=1e-9)
    np.testing.assert_allclose(sorted(result.axis_angles), [0, degrees(angle)], atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 3), (30, 3), (2, 1), (5, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_the_kl_agrees_with_dense_covariances(shape, seed):
    D, K = shape
    first, second = parameters(seed, K, D), parameters(seed + 50, K, D)
    result = subspace(model(*first), model(*second))
    assert result.kl == pytest.approx(oracles.implied_kl(first, second), rel=1e-9)
    back = subspace(model(*second), model(*first))
    assert back.kl == pytest.approx(oracles.implied_kl(second, first), rel=1e-9)
    assert back.kl != pytest.approx(result.kl, rel=1e-3)


def test_the_kl_with_small_noise():
    """l / s2 = 1e8: accurate up to the cancellation in a difference of large numbers."""
    first, second = parameters(0, noise=1e-8), parameters(0, noise=2e-8)
    expected = 0.5 * (D - K) * (0.5 - 1 + np.log(2))  # the K large directions hardly differ
    result = subspace(model(*first), model(*second))
    assert result.kl == pytest.approx(expected, abs=1e-6)


def test_the_distance_of_a_model_to_itself_is_zero():
    ppca = model(*parameters(0))
    result = subspace(ppca, ppca)
    assert result.largest_angle < 1e-6
    assert float(result.axis_angles.max()) < 1e-5
    assert abs(result.kl) < 1e-12
    torch.testing.assert_close(result.aligned, ppca.loadings.detach())


@pytest.mark.parametrize("seed", range(3))
def test_a_rotation_of_the_loadings_changes_no_angle_and_no_kl(seed):
    (loc, loadings, noise), second = parameters(seed), parameters(seed + 50)
    turned = model(loc, loadings @ oracles.rotation(K, seed), noise)
    same = subspace(model(loc, loadings, noise), turned)
    assert same.largest_angle < 1e-5
    assert abs(same.kl) < 1e-12
    # The aligned loadings equal those of the first model.
    np.testing.assert_allclose(same.aligned, loadings, atol=1e-10)
    plain, other = (
        subspace(model(loc, loadings, noise), model(*second)),
        subspace(turned, model(*second)),
    )
    torch.testing.assert_close(plain.angles, other.angles)
    assert other.kl == pytest.approx(plain.kl, rel=1e-9)


def test_loadings_are_aligned_by_procrustes_analysis():
    first, second = parameters(0), parameters(1)
    result = subspace(model(*first), model(*second))
    rotation, _ = orthogonal_procrustes(second[1], first[1])
    np.testing.assert_allclose(result.aligned, second[1] @ rotation, atol=1e-10)
    # No other rotation is closer, and the implied covariance of the second model is unchanged.
    distance = np.linalg.norm(result.aligned.numpy() - first[1])
    for seed in range(20):
        assert np.linalg.norm(second[1] @ oracles.rotation(K, seed) - first[1]) >= distance
    np.testing.assert_allclose(
        result.aligned @ result.aligned.T, second[1] @ second[1].T, atol=1e-10
    )


def test_axes_are_matched_for_any_order_sign_and_length():
    loc, loadings, noise = parameters(0)
    axes = np.linalg.qr(loadings)[0] * [3.0, 2.0, 1.0]
    shuffled = axes[:, [2, 0, 1]] * [-1.0, 4.0, -0.5]
    result = subspace(model(loc, axes, noise), model(loc, shuffled, noise))
    np.testing.assert_allclose(result.axis_angles, 0, atol=1e-5)
    assert result.kl > 0.1


def test_an_unspanned_dimension_has_an_angle_of_90_degrees():
    loadings = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 3)))[0]
    first = model(np.zeros(6), loadings, 0.5)
    for kept in (0, 1, 2):
        reduced = loadings * (np.arange(3) < kept)
        for pair in (
            (first, model(np.zeros(6), reduced, 0.5)),
            (model(np.zeros(6), reduced, 0.5), first),
        ):
            result = subspace(*pair)
            np.testing.assert_allclose(
                result.angles, [90.0] * (3 - kept) + [0.0] * kept, atol=1e-6
            )
            assert result.largest_angle == 90


def test_axis_angles_depend_on_the_rotation():
    loc, loadings, noise = parameters(0)
    axes, angle = np.linalg.qr(loadings)[0], 0.2
    turn = np.eye(K)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    result = subspace(model(loc, axes, noise), model(loc, axes @ turn, noise))
    np.testing.assert_allclose(sorted(result.axis_angles), degrees([0, angle, angle]), atol=1e-5)
    assert result.largest_angle < 1e-5


def test_the_same_transformation_of_both_models_changes_nothing():
    (loc, loadings, noise), (other_loc, others, other_noise) = parameters(0), parameters(1)
    before = subspace(model(loc, loadings, noise), model(other_loc, others, other_noise))
    turn = oracles.rotation(D, seed=3)
    after = subspace(
        model(7 * turn @ loc + 1, 7 * turn @ loadings, 49 * noise),
        model(7 * turn @ other_loc + 1, 7 * turn @ others, 49 * other_noise),
    )
    assert after.kl == pytest.approx(before.kl, rel=1e-9)
    torch.testing.assert_close(after.angles, before.angles)
    torch.testing.assert_close(after.axis_angles, before.axis_angles)


@pytest.mark.parametrize("dims", [(2, 3), (3, 2), (1, 4)])
def test_models_of_different_latent_dimension(dims):
    """Angles from the smaller space to the larger; the loadings are not aligned."""
    first, second = parameters(0, K=dims[0]), parameters(1, K=dims[1])
    result = subspace(model(*first), model(*second))
    expected = degrees(subspace_angles(first[1], second[1]))
    np.testing.assert_allclose(result.angles, expected, rtol=1e-9)
    assert len(result.angles) == len(result.axis_angles) == min(dims)
    np.testing.assert_array_equal(result.aligned, second[1])
    assert result.kl == pytest.approx(oracles.implied_kl(first, second), rel=1e-9)


def test_a_smaller_model_inside_a_larger_one():
    loc, loadings, noise = parameters(0)
    result = subspace(model(loc, loadings[:, :2], noise), model(loc, loadings, noise))
    assert result.largest_angle < 1e-5


def test_em_and_the_closed_form_agree():
    x = oracles.simulate_ppca([9.0, 4.0, 2.5], 0.8, 60, D, seed=0)
    first, second = PPCA.like(x, K, seed=0), PPCA.like(x, K, seed=1)
    fit_closed_form(first, x)
    fit_em(second, x, tol=1e-13)
    result = subspace(first, second)
    assert result.largest_angle < 1e-3
    assert 0 <= result.kl + 1e-12 < 1e-9
    # The axes of EM are arbitrary; rotated to the principal axes they equal the closed form's.
    assert float(subspace(first, second.canonical()).axis_angles.max()) < 1e-2


def test_float32_models_are_compared_in_float64():
    first, second = parameters(0), parameters(1)
    result = subspace(model(*first, dtype=torch.float32), model(*second, dtype=torch.float32))
    assert result.angles.dtype == result.aligned.dtype == torch.float64
    assert result.kl == pytest.approx(oracles.implied_kl(first, second), rel=1e-5)


def test_any_object_with_loadings_loc_and_noise_scale_is_accepted():
    first, second = parameters(0), parameters(1)

    def other(loc, loadings, noise):
        return SimpleNamespace(
            loadings=torch.tensor(loadings),
            loc=torch.tensor(loc),
            noise_scale=torch.tensor(noise**0.5, dtype=torch.float64),
        )

    plain = subspace(other(*first), other(*second))
    assert plain.kl == pytest.approx(oracles.implied_kl(first, second), rel=1e-9)


def test_models_are_not_changed():
    first, second = model(*parameters(0)), model(*parameters(1))
    before = [p.detach().clone() for p in (*first.parameters(), *second.parameters())]
    result = subspace(first, second)
    after = (*first.parameters(), *second.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not result.aligned.requires_grad
    assert all(p.requires_grad and p.grad is None for p in after)


def test_models_of_different_data_dimensions_are_rejected():
    message = "the models have different data dimensions, 8 and 7"
    with pytest.raises(ValueError, match=message):
        subspace(model(*parameters(0)), model(*parameters(1, D=7)))


def test_a_result_can_be_printed_and_stored():
    result = subspace(model(*parameters(0)), model(*parameters(1)))
    assert isinstance(result, Subspace)
    assert repr(result) == (
        f"Subspace: largest principal angle {result.largest_angle:.3g} degrees, "
        f"KL {result.kl:.4g} nats per datum"
    )
    frame = result.to_frame()
    assert len(frame) == K
    assert list(frame.columns) == ["angles", "axis_angles"]
    as_json = json.loads(json.dumps(result.to_dict()))
    assert as_json["kl"] == result.kl
    assert np.shape(as_json["aligned"]) == (D, K)
