"""What rounded matrix products cost in nats: trained with them, and evaluated with them."""

import torch

from ppl_vae import VAE, digits, fit_svi, log_likelihood
from ppl_vae.data.splits import split


def nats(device, steps):
    """Mean log p of held-out digits by precision: of the training, and of the evaluation alone."""
    parts = split(torch.from_numpy(digits()).float())
    train, test = parts.train.to(device), parts.test.to(device)
    names = ["float32", "bf16", *(["tf32"] if device.type == "cuda" else [])]
    fitted, found = {}, {}
    for name in names:
        vae = VAE.mlp(train.shape[1], 8, hidden=(128,), seed=0)
        options = {"steps": steps, "batch_size": 128, "lr": 1e-3, "seed": 0, "precision": name}
        fit_svi(vae.model, vae.guide, train, device=device, capture=False, **options)
        fitted[name] = vae
        estimate = log_likelihood(vae.model, vae.guide, test, 1000, seed=0)
        found[f"trained in {name}"] = estimate.value
    vae = fitted["float32"]
    for name in names[1:]:
        estimate = log_likelihood(vae.model, vae.guide, test, 1000, seed=0, precision=name)
        found[f"evaluated in {name}"] = estimate.value
    exact = vae.double()
    estimate = log_likelihood(exact.model, exact.guide, test.double(), 1000, seed=0)
    found["evaluated in float64"] = estimate.value
    return {name: float(value.double().mean()) for name, value in found.items()}
