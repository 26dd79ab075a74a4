"""Documents simulated from known topics, and the matching of fitted topics to true ones."""

from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize


class SimulatedTopics(NamedTuple):
    """Counts (N, D), word probabilities of the topics (K, D), and topic proportions (N, K)."""

    counts: Tensor
    topics: Tensor
    proportions: Tensor


def simulate_topics(
    num_documents, num_words, num_topics, *, length=100.0, concentration=0.3, sparsity=0.1, seed=0
):
    """Documents of latent Dirichlet allocation (Blei, Ng, Jordan 2003).

    topic_k ~ Dirichlet(sparsity), theta_n ~ Dirichlet(concentration),
    length_n ~ 1 + Poisson(length - 1), x_n ~ Multinomial(length_n, theta_n topics)
    """
    rng = np.random.default_rng(seed)
    topics = rng.dirichlet(np.full(num_words, sparsity), num_topics)
    proportions = rng.dirichlet(np.full(num_topics, concentration), num_documents)
    lengths = 1 + rng.poisson(length - 1, num_documents)
    counts = rng.multinomial(lengths, proportions @ topics).astype(float)
    return SimulatedTopics(*map(torch.from_numpy, (counts, topics, proportions)))


def match_topics(fitted, truth):
    """The fitted topic of each true one, by the matching of largest total cosine.

    Returns, for each true topic, the row of ``fitted`` and the cosine between the two.
    """
    cosines = normalize(truth.double()) @ normalize(fitted.double()).mT
    rows, columns = map(torch.from_numpy, linear_sum_assignment(-cosines.numpy()))
    return columns, cosines[rows, columns]
