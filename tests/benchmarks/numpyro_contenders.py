"""The same VAE in NumPyro: ``svi.update`` jitted, and a whole loop on the device.

Needs the extra ``bench``; without it there are no contenders here.
"""

try:
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer import SVI, TraceMeanField_ELBO
except ImportError:
    jax = None

LATENT, RATE = 20, 1e-3


def _layer(name, values, width):
    # PyTorch's own initial scale, so that the numbers on the way are of one size.
    bound = values.shape[-1] ** -0.5
    key = numpyro.prng_key()

    def start(shape):
        drawn = jax.random.uniform(key, shape, minval=-bound, maxval=bound)
        return numpyro.param(f"{name}_{len(shape)}", drawn)

    return values @ start((values.shape[-1], width)) + start((width,))


def _model(hidden):
    def model(x):
        log_scale = numpyro.param("log_scale", jnp.zeros(()))
        with numpyro.plate("data", x.shape[0]):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(LATENT), 1.0).to_event(1))
            mean = _layer("out", jax.nn.relu(_layer("up", z, hidden)), 784)
            numpyro.sample("x", dist.Normal(mean, jnp.exp(log_scale)).to_event(1), obs=x)

    return model


def _guide(hidden):
    def guide(x):
        code = _layer("code", jax.nn.relu(_layer("down", x, hidden)), 2 * LATENT)
        loc, raw = code[..., :LATENT], code[..., LATENT:]
        scale = jnp.exp(0.5 * raw)
        with numpyro.plate("data", x.shape[0]):
            numpyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return guide


def _svi(x, rows, hidden):
    adam = numpyro.optim.Adam(RATE)
    svi = SVI(_model(hidden), _guide(hidden), adam, TraceMeanField_ELBO())
    data = jnp.asarray(x.cpu().numpy())
    index = jnp.stack([jnp.asarray(some.cpu().numpy()) for some in rows])
    return svi, data, index, svi.init(jax.random.PRNGKey(0), data[index[0]])


def update(x, rows, hidden):
    """``svi.update`` under ``jax.jit``, one call a step."""
    svi, data, index, state = _svi(x, rows, hidden)
    step = jax.jit(lambda state, some: svi.update(state, data[some])[0])
    index = list(index)

    def run():
        nonlocal state
        for some in index:
            state = step(state, some)
        jax.block_until_ready(state)

    return run


def fori_loop(x, rows, hidden):
    """All steps in one ``jax.lax.fori_loop``."""
    svi, data, index, state = _svi(x, rows, hidden)

    def step(place, state):
        return svi.update(state, data[index[place]])[0]

    loop = jax.jit(lambda state: jax.lax.fori_loop(0, len(index), step, state))

    def run():
        nonlocal state
        state = loop(state)
        jax.block_until_ready(state)

    return run


TRAINING = (
    {}
    if jax is None
    else {
        "NumPyro, svi.update jitted": update,
        "NumPyro, fori_loop": fori_loop,
    }
)
