"""Loaded programs equal the saved ones, and damaged or mismatched folders are refused."""

import json
from functools import partial

import pyro
import pytest
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import nn

from ppl_vae import AmortizedGuide, ExactGuide, PerDatumGuide, fit_vb, log_weights
from ppl_vae.likelihoods import Bernoulli, Categorical, Gaussian
from ppl_vae.models import PPCA, VAE, Autoencoder, BayesianPPCA, load, save, topic_vae
from ppl_vae.models.stored_config import FORMAT
from ppl_vae.networks import GaussianNoise, MaskingNoise

IMAGES = (1, 4, 4)
PROGRAMS = {
    "ppca": lambda: PPCA(6, 2, seed=1).double(),
    "bayesian ppca": lambda: BayesianPPCA.like(torch.randn(20, 6), 2, prior="ard"),
    "variational posterior": lambda: fit_vb(BayesianPPCA(6, 2), torch.randn(20, 6)).guide,
    "factor analysis": lambda: PPCA(6, 2, noise="diagonal", seed=1),
    "vae": lambda: VAE.mlp(6, 2, hidden=(5, 4), activation="tanh", covariance="full", seed=1),
    "vae, fixed scale": lambda: VAE.mlp(6, 2, likelihood=Gaussian(0.3), seed=1).double(),
    "vae, bernoulli": lambda: VAE.mlp(6, 2, likelihood=Bernoulli(), seed=1),
    "vae, zeros+mask": lambda: VAE.mlp(6, 2, missing="zeros+mask", seed=1),
    "vae, standardized": lambda: VAE.like(torch.randn(20, 6), 2, seed=1),
    "vae, categorical": lambda: VAE.mlp(6, 2, likelihood=Categorical(3), inputs="log1p", seed=1),
    "vae, convolutional": lambda: VAE.conv(IMAGES, 2, channels=(3,), seed=1),
    "topic vae": lambda: topic_vae(9, 3, variant="prodlda", concentration=0.5, hidden=(4,)),
    "autoencoder": lambda: Autoencoder.mlp(
        6,
        2,
        hidden=(5,),
        activation="tanh",
        code_activation="relu",
        columns="unit",
        likelihood=Bernoulli(soft_targets=True),
        prior="laplace",
        penalty=0.3,
        corruption=MaskingNoise(0.2, value=0.5),
    ),
    "tied autoencoder": lambda: Autoencoder.linear(6, 2, tied=True, columns="orthonormal"),
    "masked autoencoder": lambda: Autoencoder.masked(
        IMAGES,
        (2, 2),
        share=0.5,
        width=8,
        depth=1,
        heads=2,
        decoder_width=4,
        corruption=GaussianNoise(0.1),
    ),
    "one q per datum": lambda: PerDatumGuide(7, 2, covariance="isotropic"),
    "one unit q per datum": lambda: PerDatumGuide(7, 2, covariance="unit"),
}


@pytest.mark.parametrize("make", PROGRAMS.values(), ids=PROGRAMS)
def test_a_loaded_program_is_the_saved_one(make, tmp_path):
    program = make()
    with torch.no_grad():
        for number, parameter in enumerate(program.parameters()):
            parameter.add_(0.1 * number + 0.01)
    loaded = load(save(program, tmp_path / "model"))
    assert type(loaded) is type(program)
    assert loaded._pyro_name != program._pyro_name
    ours, theirs = program.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name])
    assert repr(loaded) == repr(program) and loaded.config() == program.config()


def test_a_loaded_vae_gives_the_same_log_weights(tmp_path):
    vae = VAE.mlp(6, 2, likelihood=Gaussian("shared", initial=0.7, floor=1e-3), seed=1).double()
    x = torch.randn(8, 6, dtype=torch.float64)
    loaded = load(save(vae, tmp_path))
    pairs = [(v.model, v.guide) for v in (vae, loaded)]
    a, b = (log_weights(*pair, x, 3, seed=0) for pair in pairs)
    assert torch.equal(a, b)
    assert loaded.likelihood.floor == 1e-3


@pytest.mark.parametrize("missing", ["zeros", "zeros+mask"])
def test_a_loaded_encoder_encodes_missing_values_as_the_saved_one(missing, tmp_path):
    vae = VAE.mlp(6, 2, missing=missing, seed=1).double()
    x = torch.randn(8, 6, dtype=torch.float64)
    x[x > 1] = torch.nan
    loaded = load(save(vae, tmp_path))
    assert loaded.guide.missing == missing
    a, b = (log_weights(v.model, v.guide, x, 3, seed=0) for v in (vae, loaded))
    assert torch.equal(a, b)


def test_a_loaded_pair_trains_independently_of_the_saved_one(tmp_path):
    x = torch.randn(30, 6)
    vae = VAE.mlp(6, 2, seed=1)
    SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), TraceMeanField_ELBO()).step(x)
    loaded = load(save(vae, tmp_path))
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}
    svi = SVI(loaded.model, loaded.guide, pyro.optim.Adam({"lr": 0.01}), TraceMeanField_ELBO())
    for _ in range(3):
        svi.step(x)
    for name, parameter in loaded.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    for name, parameter in vae.named_parameters():
        assert torch.equal(parameter, before[name]), name


def vae_of_user_networks():
    return VAE(
        decoder=nn.Linear(2, 6),
        encoder=nn.Linear(6, 4),
        likelihood=Bernoulli(),
        data_dim=6,
        latent_dim=2,
    )


def test_user_written_networks_are_loaded_into_a_program_of_the_caller(tmp_path):
    vae = vae_of_user_networks()
    save(vae, tmp_path)
    with pytest.raises(ValueError, match="parts that only its author can rebuild"):
        load(tmp_path)
    other = vae_of_user_networks()
    assert load(tmp_path, into=other) is other
    assert torch.equal(other.decoder.weight, vae.decoder.weight)


def test_user_written_corruption_needs_a_program_of_the_caller(tmp_path):
    make = partial(Autoencoder.mlp, 6, 2, corruption=torch.tanh)
    save(autoencoder := make(), tmp_path)
    with pytest.raises(ValueError, match="parts that only its author can rebuild"):
        load(tmp_path)
    other = load(tmp_path, into=make())
    assert torch.equal(other.decoder[0].weight, autoencoder.decoder[0].weight)


def test_shared_tensors_are_stored_once_and_remain_shared(tmp_path):
    encoder = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    guide = AmortizedGuide(encoder, 2)
    encoder[0].weight = nn.Parameter(torch.randn(6, 6))
    guide.again = encoder[0]
    save(guide, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["aliases"] == {
        "again.weight": "encoder.0.weight",
        "again.bias": "encoder.0.bias",
    }
    weight = encoder[0].weight.detach().clone()
    with torch.no_grad():
        encoder[0].weight.zero_()
    load(tmp_path, into=guide)
    assert torch.equal(guide.again.weight, weight)


def test_a_damaged_folder_is_refused(tmp_path):
    save(PPCA(6, 2, seed=1), tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    data, text = weights.read_bytes(), config.read_text()
    for damaged in (data[:-3], data[:10], data[:-1] + bytes([data[-1] ^ 1]), b""):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match="checksum differs"):
            load(tmp_path)
    weights.write_bytes(data)
    for damaged in (text[:20], "[]", "{}", text.replace(f'"format": {FORMAT}', '"format": 9')):
        config.write_text(damaged)
        with pytest.raises(ValueError, match=r"config\.json is"):
            load(tmp_path)
    for old, new in (
        ("latent_dim", "latent_dims"),
        ('"name": "PPCA"', '"name": "exec"'),
        ('"program": "PPCA"', '"program": "VAE"'),
    ):
        config.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match="damaged"):
            load(tmp_path)
    config.unlink()
    with pytest.raises(FileNotFoundError):
        load(tmp_path)


def test_another_program_is_refused(tmp_path):
    save(PPCA(6, 2, seed=1), tmp_path)
    with pytest.raises(ValueError, match="they differ in"):
        load(tmp_path, into=PPCA(6, 3))
    with pytest.raises(ValueError, match="holds a PPCA, and into= is a VAE"):
        load(tmp_path, into=VAE.mlp(6, 2))
    save(ExactGuide(PPCA(6, 2)), tmp_path / "guide")
    with pytest.raises(ValueError, match="pass it as into="):
        load(tmp_path / "guide")


def test_saving_again_replaces_the_earlier_files(tmp_path):
    save(PPCA(6, 2, seed=1), tmp_path)
    again = PPCA(7, 3, seed=2)
    save(again, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(load(tmp_path).loadings, again.loadings)
