"""Encoder and decoder perceptrons of autoencoders: tied weights, unit columns, sparse codes."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from ppl_vae.core.state import seeded
from ppl_vae.core.validation import check_option
from ppl_vae.guides.guides import num_encoder_inputs
from ppl_vae.networks.mlp_conv import mlp
from ppl_vae.networks.sparse_layers import (
    CODE_ACTIVATIONS,
    COLUMNS,
    NormalizedColumns,
    TiedEncoder,
    make_code_activation,
)


def mlp_networks(
    data_dim: int,
    latent_dim: int,
    outputs_per_dim: int,
    *,
    hidden: Sequence[int],
    activation: str,
    code_activation: str,
    columns: str,
    tied: bool,
    missing: str,
    seed: int | None,
) -> tuple[nn.Sequential, nn.Sequential]:
    """The encoder and decoder of :meth:`ppl_vae.Autoencoder.mlp`, which describes the options.

    Raises:
        ValueError: if an option is unknown, or options cannot be combined.
    """
    check_option("columns", columns, COLUMNS)
    check_option("code_activation", code_activation, CODE_ACTIVATIONS)
    if tied and (hidden or missing != "zeros" or outputs_per_dim != 1):
        raise ValueError(
            "tied=True needs an encoder that can be the decoder's transpose: hidden=(), "
            "missing='zeros', and a likelihood with one output per dimension"
        )
    rows = num_encoder_inputs(missing, data_dim)
    with seeded(seed):
        encoder = mlp(rows, latent_dim, hidden, activation=activation)
        decoder = mlp(latent_dim, data_dim * outputs_per_dim, hidden[::-1], activation=activation)
    if columns != "free":
        first: Any = decoder[0]
        decoder[0] = NormalizedColumns(first, columns)
    if tied:
        encoder = nn.Sequential(TiedEncoder(decoder[0]))
    if code_activation != "linear":
        encoder.append(make_code_activation(code_activation, latent_dim))
    return encoder, decoder
