"""Coordinates of loadings up to a rotation: their density, against simulation and Jacobians."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Chi2, Normal

from ppl_vae.inference.mcmc.trapezoidal import TrapezoidalLoadings, orthogonal

SHAPES = [(2, 1), (4, 1), (4, 2), (6, 3), (5, 4)]


def made(data_dim, latent_dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(data_dim, generator=generator, dtype=torch.float64) + 0.5
    loadings = torch.randn(data_dim, latent_dim, generator=generator, dtype=torch.float64)
    return TrapezoidalLoadings.pivoted(loadings, scale), loadings * scale[:, None]


@pytest.mark.parametrize(("data_dim", "latent_dim"), SHAPES)
def test_coordinates_keep_the_covariance(data_dim, latent_dim):
    trapezoid, loadings = made(data_dim, latent_dim)
    coordinates = trapezoid.coordinates(loadings)
    lower = trapezoid.loadings(coordinates)
    torch.testing.assert_close(lower @ lower.mT, loadings @ loadings.mT)
    torch.testing.assert_close(trapezoid.coordinates(lower), coordinates)
    triangle = (lower / trapezoid.scale[:, None])[trapezoid.order]
    assert (triangle.triu(1) == 0).all()
    assert (triangle.diagonal() > 0).all()


def test_coordinates_do_not_depend_on_a_rotation():
    trapezoid, loadings = made(5, 3)
    rotation = orthogonal(torch.randn(7, 3, 3, dtype=torch.float64))
    expected = trapezoid.coordinates(loadings).expand(7, -1)
    torch.testing.assert_close(trapezoid.coordinates(loadings @ rotation), expected)


def test_prior_of_the_coordinates_is_normal_and_chi():
    trapezoid, _ = made(5, 3)
    coordinates = torch.randn(4, trapezoid.num_coordinates, dtype=torch.float64)
    below, log_diagonal = coordinates.split([9, 3], -1)
    square = (2 * log_diagonal).exp()
    chi = Chi2(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)).log_prob(square)
    # d square / d log_diagonal = 2 square
    expected = Normal(0.0, 1.0).log_prob(below).sum(-1) + (chi + (2 * square).log()).sum(-1)
    torch.testing.assert_close(trapezoid.log_prior(coordinates), expected)


@pytest.mark.parametrize(("data_dim", "latent_dim"), [(4, 2), (4, 3)])
def test_prior_of_the_covariance_is_that_of_normal_loadings(data_dim, latent_dim):
    trapezoid, _ = made(data_dim, latent_dim)
    number = 20_000
    torch.manual_seed(0)
    freedom = latent_dim - torch.arange(latent_dim, dtype=torch.float64)
    normal = torch.randn(number, trapezoid.num_coordinates - latent_dim, dtype=torch.float64)
    log_diagonal = Chi2(freedom).sample((number,)).log() / 2
    loadings = trapezoid.loadings(torch.cat([normal, log_diagonal], -1))
    products = loadings @ loadings.mT
    # W W' is Wishart: E = K V with V = diag(s^2), and Var_ij = K (V_ii V_jj + V_ij^2).
    variances = trapezoid.scale.square()
    expected = latent_dim * torch.diag(variances)
    spread = latent_dim * (torch.outer(variances, variances) + torch.diag(variances.square()))
    z = (products.mean(0) - expected) / (spread / number).sqrt()
    assert z.abs().max() < 4.5
    squares = (products - expected).square()
    z = (squares.mean(0) - spread) / (squares.std(0) / math.sqrt(number))
    assert z.abs().max() < 4.5


def test_volume_of_one_column_is_that_of_a_scale_and_a_sign():
    trapezoid, _ = made(4, 1)
    coordinates = torch.randn(3, 4, dtype=torch.float64)
    # W = +-s L with L_00 = exp(t): dW = prod(s) exp(t) dt dL, and each sign has probability 1/2.
    expected = math.log(2) + coordinates[:, -1] + trapezoid.scale.log().sum()
    torch.testing.assert_close(trapezoid.log_volume(coordinates), expected)


def test_volume_of_two_columns_is_the_determinant_of_the_jacobian():
    trapezoid, _ = made(4, 2)
    coordinates = torch.randn(trapezoid.num_coordinates, dtype=torch.float64)

    def flat(values):
        angle = values[-1]
        first = torch.stack([angle.cos(), angle.sin()])
        second = torch.stack([-angle.sin(), angle.cos()])
        return (trapezoid.loadings(values[:-1]) @ torch.stack([first, second])).flatten()

    values = torch.cat([coordinates, torch.tensor([0.7], dtype=torch.float64)])
    jacobian = torch.autograd.functional.jacobian(flat, values)
    # The angle is uniform on 2 pi, and Q is a rotation or a reflection with probability 1/2.
    expected = torch.linalg.slogdet(jacobian).logabsdet + math.log(4 * math.pi)
    torch.testing.assert_close(trapezoid.log_volume(coordinates), expected)


def test_pivots_are_the_rows_far_from_collinear():
    loadings = torch.tensor([[0.1, 0.0], [3.0, 0.0], [3.0, 0.1], [0.0, 2.0]]).double()
    trapezoid = TrapezoidalLoadings.pivoted(loadings, torch.ones(4, dtype=torch.float64))
    assert trapezoid.order[:2].tolist() == [2, 3]


def test_orthogonal_factors_are_uniform():
    torch.manual_seed(0)
    q = orthogonal(torch.randn(20_000, 3, 3, dtype=torch.float64))
    torch.testing.assert_close(
        q @ q.mT, torch.eye(3, dtype=torch.float64).expand_as(q), atol=1e-12, rtol=0
    )
    # Elements have mean 0, variance 1 / K and fourth moment 3 / (K (K + 2)).
    elements = q.flatten(1).numpy()
    error = 1 / np.sqrt(len(q))
    assert np.abs(elements.mean(0)).max() < 4.5 * error * np.sqrt(1 / 3)
    spread = np.sqrt(3 / 15 - 1 / 9)
    assert np.abs((elements**2).mean(0) - 1 / 3).max() < 4.5 * error * spread
    assert abs(float(torch.linalg.det(q).mean())) < 4.5 * error
