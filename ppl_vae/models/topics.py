"""Topic models: a VAE of word counts whose decoder is a table of topics.

A topic is a row of word probabilities, a document's code z determines its proportions of K topics,
and its counts x are multinomial given its length.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ppl_vae.core.config import configurable
from ppl_vae.core.state import seeded
from ppl_vae.core.validation import check_int, check_option
from ppl_vae.guides.families import num_scale_outputs
from ppl_vae.likelihoods.discrete import Multinomial
from ppl_vae.models.standardization import LogCounts
from ppl_vae.models.vae import VAE
from ppl_vae.networks.mlp_conv import mlp

VARIANTS = ("lda", "prodlda")
INITIAL_SCALE = 0.25
"""Initial standard deviation of a topic's logits; equal topics would remain equal in training."""


class TopicDecoder(nn.Module):
    """Logits of words from codes, through topic proportions theta = softmax(s z).

    =============  ==========================  ===================================================
    ``"lda"``      log(theta @ topics)         latent Dirichlet allocation: each word is drawn
                                               from one topic
    ``"prodlda"``  theta @ weights + bias      ProdLDA: a product of experts
    =============  ==========================  ===================================================

    In both variants topics = softmax(weights + bias), which is p(word | z) for a document of one
    topic. With z ~ N(0, I) and s^2 = 1 / concentration, the prior of theta is the Laplace
    approximation of Dirichlet(concentration) in the softmax basis. (ProdLDA drops its covariances
    and has s^2 = (1 - 1/K) / concentration. The variance here is larger along (1, .., 1) only,
    a direction that does not change theta.)

    Args:
        num_topics: K, at least 2.
        num_words: D.
        variant: ``"lda"`` or ``"prodlda"``.
        concentration: the concentration of the Dirichlet; the smaller it is, the fewer topics a
            document has.

    References:
        Blei, Ng, Jordan: Latent Dirichlet allocation (2003); Srivastava, Sutton: Autoencoding
        variational inference for topic models (2017); MacKay: Choice of basis for Laplace
        approximation (1998).
    """

    def __init__(
        self,
        num_topics: int,
        num_words: int,
        *,
        variant: str = "lda",
        concentration: float = 0.3,
    ) -> None:
        super().__init__()
        check_int("num_topics", num_topics, 2)
        check_int("num_words", num_words)
        if not concentration > 0:
            raise ValueError(f"concentration must be positive; got {concentration}")
        self.variant = check_option("variant", variant, VARIANTS)
        self.scale = 1 / math.sqrt(concentration)
        self.weights = nn.Parameter(INITIAL_SCALE * torch.randn(num_topics, num_words))
        self.bias = nn.Parameter(torch.zeros(num_words))

    def proportions(self, z: Float[Tensor, "*B K"]) -> Float[Tensor, "*B K"]:
        """theta, the proportion of each topic."""
        return torch.softmax(self.scale * z, -1)

    @torch.no_grad()
    def topics(self) -> Float[Tensor, "K D"]:
        """Word probabilities of each topic."""
        return self._log_topics().exp()

    def _log_topics(self) -> Float[Tensor, "K D"]:
        return torch.log_softmax(self.weights + self.bias, -1)

    def forward(self, z: Float[Tensor, "B K"]) -> Float[Tensor, "B D"]:
        """Logits, up to a constant for each row."""
        if self.variant == "prodlda":
            return self.proportions(z) @ self.weights + self.bias
        # Each word's largest probability over topics is scaled to one: the product underflows
        # only if the proportion of that topic does.
        topics = self._log_topics()
        largest = topics.detach().max(0).values
        return (self.proportions(z) @ (topics - largest).exp()).log() + largest


@configurable
def topic_vae(
    data_dim: int,
    latent_dim: int,
    *,
    variant: str = "lda",
    concentration: float = 0.3,
    hidden: Sequence[int] = (64,),
    covariance: str = "diagonal",
    likelihood: Multinomial | None = None,
    seed: int | None = None,
) -> VAE:
    """A VAE of word counts whose decoder is a :class:`TopicDecoder`.

    ``vae.decoder.topics()`` are the topics. The encoder is a multilayer perceptron on log(1 + x).
    ``vae.center(x)`` starts all topics near the word frequencies; warming up the weight of the KL
    (``fit_svi(..., warmup=)``) keeps topics from collapsing before they are learned.

    Args:
        data_dim: D, words.
        latent_dim: K, topics.
        variant: how topics are mixed, ``"lda"`` or ``"prodlda"``.
        concentration: the concentration of the topics in a document.
        hidden: widths of the encoder's hidden layers.
        covariance: the guide's family.
        likelihood: by default ``Multinomial()``; one with a total count can ``sample``.
        seed: the seed of the initial weights.

    Example:
        >>> vae = topic_vae(data_dim=100, latent_dim=5, seed=0)
        >>> vae.decoder.topics().shape
        torch.Size([5, 100])
    """
    with seeded(seed):
        decoder = TopicDecoder(latent_dim, data_dim, variant=variant, concentration=concentration)
        outputs = latent_dim + num_scale_outputs(covariance, latent_dim)
        encoder = nn.Sequential(LogCounts(), *mlp(data_dim, outputs, hidden))
    return VAE(
        decoder=decoder,
        encoder=encoder,
        likelihood=Multinomial() if likelihood is None else likelihood,
        covariance=covariance,
        data_dim=data_dim,
        latent_dim=latent_dim,
    )


def top_words(
    probabilities: Float[Tensor, "M D"],
    words: Sequence[str],
    num_words: int = 8,
    *,
    base: Float[Tensor, " D"] | None = None,
    relevance: float = 0.6,
) -> list[list[str]]:
    """The most relevant words of each row of word probabilities, most relevant first.

    Without ``base`` these are the most probable words. With it, those of largest

        relevance log p_d + (1 - relevance) log(p_d / base_d),

    so that words that are frequent in all documents do not head every list.

    Args:
        probabilities: the probabilities of words in each topic, or means of counts; up to a
            constant for each row.
        words: D of them.
        num_words: how many to list.
        base: probabilities of the words in all documents, up to a constant.
        relevance: 1 ranks words by probability, 0 by the ratio to ``base``.

    Raises:
        ValueError: if there are not D words; if relevance or base is out of range.

    References:
        Sievert, Shirley: LDAvis (2014), who define relevance and found 0.6 best for readers.
    """
    if len(words) != probabilities.shape[1]:
        raise ValueError(
            f"probabilities have {probabilities.shape[1]} columns for {len(words)} words"
        )
    if not 0 <= relevance <= 1:
        raise ValueError(f"relevance must lie in 0..1; got {relevance}")
    score = probabilities.double().log()  # constants of a row do not change its order
    if base is not None:
        if not bool((base > 0).all()):
            raise ValueError("base must be positive; add 0.5 to counts if some are zero")
        score = score - (1 - relevance) * base.to(score).log()
    best = score.topk(min(check_int("num_words", num_words), len(words)), 1).indices
    return [[str(words[d]) for d in row] for row in best.tolist()]
