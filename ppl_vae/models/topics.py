"""Topics: simulated documents, and a VAE of word counts whose decoder is a table of topics.

A topic is a row of word probabilities, a document's code z a point on the simplex of K topics,
and its counts x are multinomial given its length.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from ppl_vae.core.state import seeded
from ppl_vae.core.validation import ArrayLike, as_matrix, check_int, check_option
from ppl_vae.guides.families import num_scale_outputs
from ppl_vae.likelihoods.discrete import Multinomial
from ppl_vae.models.standardization import LogCounts
from ppl_vae.models.vae import VAE
from ppl_vae.networks.mlp_conv import mlp

MIXED = ("words", "logits")
START = 0.25
"""Standard deviation of a topic's logits before it is fitted: topics that are equal stay equal."""


@dataclass(frozen=True)
class SimulatedTopics:
    """Documents drawn from topics that are known.

    Attributes:
        counts: (N, D).
        topics: word probabilities, (K, D).
        proportions: of the topics in each document, (N, K).
    """

    counts: Float[Tensor, "N D"]
    topics: Float[Tensor, "K D"]
    proportions: Float[Tensor, "N K"]


def simulate_topics(
    num_documents: int,
    num_words: int,
    num_topics: int,
    *,
    length: float = 100.0,
    concentration: float = 0.3,
    sparsity: float = 0.1,
    seed: int | None = None,
) -> SimulatedTopics:
    """Documents of latent Dirichlet allocation.

        topic_k ~ Dirichlet(sparsity),  theta_n ~ Dirichlet(concentration),
        length_n ~ 1 + Poisson(length - 1),  x_n ~ Multinomial(length_n, theta_n topics)

    Args:
        num_documents, num_words, num_topics: N, D and K.
        length: words a document, on average.
        concentration: of the proportions; the smaller, the fewer topics a document has.
        sparsity: concentration of the topics; the smaller, the fewer words a topic has.
        seed: of the draws.

    References:
        Blei, Ng, Jordan: Latent Dirichlet allocation (2003).
    """
    n, d, k = (
        check_int(name, size)
        for name, size in zip(
            ("num_documents", "num_words", "num_topics"),
            (num_documents, num_words, num_topics),
            strict=True,
        )
    )
    if length < 1:
        raise ValueError(f"length must be at least one word; got {length}")
    _positive(concentration=concentration, sparsity=sparsity)
    rng = np.random.default_rng(seed)
    topics = rng.dirichlet(np.full(d, sparsity), k)
    proportions = rng.dirichlet(np.full(k, concentration), n)
    counts = rng.multinomial(1 + rng.poisson(length - 1, n), proportions @ topics)
    return SimulatedTopics(*map(torch.from_numpy, (counts.astype(float), topics, proportions)))


def _positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not number > 0:
            raise ValueError(f"{name} must be positive; got {number}")


class TopicDecoder(nn.Module):
    """Logits of words from codes, through proportions of topics theta = softmax(s z).

    ==============  =====================================  ======================================
    ``"words"``     log(theta @ topics)                    latent Dirichlet allocation: each word
                                                           is of one topic
    ``"logits"``    theta @ weights + bias                 ProdLDA: a product of experts
    ==============  =====================================  ======================================

    with topics = softmax(weights + bias) in both: what p(word | z) is where one topic is all.
    With z ~ N(0, I) and s^2 = 1 / concentration, theta's prior is the Laplace approximation of
    Dirichlet(concentration) in the basis of the softmax. (ProdLDA drops its covariances, and has
    s^2 = (1 - 1/K) / concentration; along (1, .., 1), which makes no difference, here is more.)

    Args:
        num_topics: K, at least 2.
        num_words: D.
        mixed: ``"words"`` or ``"logits"``.
        concentration: of the Dirichlet; the smaller, the fewer topics a document has.

    References:
        Srivastava, Sutton: Autoencoding variational inference for topic models (2017); MacKay:
        Choice of basis for Laplace approximation (1998).
    """

    def __init__(
        self, num_topics: int, num_words: int, *, mixed: str = "words", concentration: float = 0.3
    ) -> None:
        super().__init__()
        check_int("num_topics", num_topics, 2)
        check_int("num_words", num_words)
        _positive(concentration=concentration)
        self.mixed = check_option("mixed", mixed, MIXED)
        self.scale = 1 / math.sqrt(concentration)
        self.weights = nn.Parameter(START * torch.randn(num_topics, num_words))
        self.bias = nn.Parameter(torch.zeros(num_words))

    def proportions(self, z: Float[Tensor, "*B K"]) -> Float[Tensor, "*B K"]:
        """theta, the share of each topic."""
        return torch.softmax(self.scale * z, -1)

    @torch.no_grad()
    def topics(self) -> Float[Tensor, "K D"]:
        """Word probabilities of each topic."""
        return self._log_topics().exp()

    def _log_topics(self) -> Float[Tensor, "K D"]:
        return torch.log_softmax(self.weights + self.bias, -1)

    def forward(self, z: Float[Tensor, "B K"]) -> Float[Tensor, "B D"]:
        """Logits, up to a constant a row."""
        if self.mixed == "logits":
            return self.proportions(z) @ self.weights + self.bias
        # Of each word the largest share over topics is one here: the product cannot underflow
        # unless the topic that has it does.
        topics = self._log_topics()
        largest = topics.detach().max(0).values
        return (self.proportions(z) @ (topics - largest).exp()).log() + largest


def topic_vae(
    data_dim: int,
    latent_dim: int,
    *,
    mixed: str = "words",
    concentration: float = 0.3,
    hidden: Sequence[int] = (64,),
    covariance: str = "diagonal",
    likelihood: Multinomial | None = None,
    seed: int | None = None,
) -> VAE:
    """A VAE of word counts whose decoder is a :class:`TopicDecoder`: ``vae.decoder.topics()``.

    Its encoder is a multilayer perceptron on log(1 + x). ``vae.center(x)`` starts all topics about
    the shares of the words; a warm-up of the KL keeps topics from dying before they are learned.

    Args:
        data_dim: D, words.
        latent_dim: K, topics.
        mixed: what a document's topics share, ``"words"`` or ``"logits"``.
        concentration: of the topics in a document.
        hidden: the encoder's hidden widths.
        covariance: the guide's family.
        likelihood: by default ``Multinomial()``; one with a total can ``sample``.
        seed: of the initial weights.

    Example:
        >>> true = simulate_topics(500, 100, 5, seed=0)
        >>> vae = topic_vae(100, 5, seed=0).center(true.counts)
        >>> how = {"epochs": 100, "batch_size": 100, "lr": 0.03, "warmup": 250, "seed": 0}
        >>> fit = fit_svi(vae.model, vae.guide, true.counts, **how)
        >>> match_topics(vae.decoder.topics(), true.topics)[1].min() > 0.9
        tensor(True)
    """
    with seeded(seed):
        decoder = TopicDecoder(latent_dim, data_dim, mixed=mixed, concentration=concentration)
        outputs = latent_dim + num_scale_outputs(covariance, latent_dim)
        encoder = nn.Sequential(LogCounts(), *mlp(data_dim, outputs, hidden))
    sizes: dict[str, Any] = {"data_dim": data_dim, "latent_dim": latent_dim}
    likelihood = Multinomial() if likelihood is None else likelihood
    vae = VAE(
        decoder=decoder, encoder=encoder, likelihood=likelihood, covariance=covariance, **sizes
    )
    told = {"mixed": mixed, "concentration": concentration, "hidden": list(hidden)}
    vae._config = sizes | told | {"covariance": covariance, "networks": "topics"}
    return vae


def top_words(
    shares: Float[Tensor, "M D"],
    words: Sequence[str],
    num_words: int = 8,
    *,
    base: Float[Tensor, " D"] | None = None,
    relevance: float = 0.6,
) -> list[list[str]]:
    """The words that say most of each row of word probabilities, best first.

    Without ``base``, the most probable ones. With it, those of largest

        relevance log p_d + (1 - relevance) log(p_d / base_d),

    so that words which are frequent everywhere do not head every list.

    Args:
        shares: topics, means of counts: each row's probabilities, up to a constant.
        words: D of them.
        num_words: how many to name.
        base: probabilities of the words in all documents, up to a constant.
        relevance: 1 for the most probable words, 0 for those most unlike ``base``.

    Raises:
        ValueError: if there are not D words; if relevance or base is out of range.

    References:
        Sievert, Shirley: LDAvis (2014), of the relevance; 0.6 is what its readers found best.
    """
    if len(words) != shares.shape[1]:
        raise ValueError(f"shares have {shares.shape[1]} columns for {len(words)} words")
    if not 0 <= relevance <= 1:
        raise ValueError(f"relevance must lie in 0..1; got {relevance}")
    score = shares.double().log()  # constants of a row do not change its order
    if base is not None:
        if not bool((base > 0).all()):
            raise ValueError("base must be positive; add 0.5 to counts of which some are zero")
        score = score - (1 - relevance) * base.to(score).log()
    best = score.topk(min(check_int("num_words", num_words), len(words)), 1).indices
    return [[str(words[d]) for d in row] for row in best.tolist()]


def match_topics(
    found: ArrayLike, truth: ArrayLike
) -> tuple[Int[Tensor, " K"], Float[Tensor, " K"]]:
    """Which found topic is which true one, by the matching of largest total cosine.

    Args:
        found: word probabilities, (L, D) with L >= K.
        truth: word probabilities, (K, D).

    Returns:
        For each true topic the row of ``found``, and the cosine between the two.

    Raises:
        ValueError: if their shapes do not fit.
    """
    ours, theirs = (as_matrix(t).double().cpu() for t in (found, truth))
    if ours.shape[1] != theirs.shape[1] or len(ours) < len(theirs):
        raise ValueError(
            "found must have truth's columns and at least its rows; they have shapes "
            f"{tuple(ours.shape)} and {tuple(theirs.shape)}"
        )
    cosines = nn.functional.normalize(theirs) @ nn.functional.normalize(ours).mT
    rows, columns = map(torch.from_numpy, linear_sum_assignment(-cosines.numpy()))
    return columns, cosines[rows, columns]
