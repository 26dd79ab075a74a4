"""Word counts of texts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ppl_vae.core.text import counted
from ppl_vae.core.validation import check_int


@dataclass(frozen=True)
class WordCounts:
    """The number of occurrences of each word in each document.

    Attributes:
        counts: (N, D).
        words: the D words, in alphabetical order.
        names: names of the N documents.
    """

    counts: Float[Tensor, "N D"]
    words: tuple[str, ...]
    names: tuple[str, ...]

    def __repr__(self) -> str:
        total, empty = int(self.counts.sum()), int((self.counts.sum(1) == 0).sum())
        without = f", {empty} documents without any of the words" if empty else ""
        n, d = self.counts.shape
        size = f"{counted(n, 'document')}, {counted(d, 'word')}, {counted(total, 'occurrence')}"
        return f"WordCounts: {size}{without}"


def count_words(
    texts: Mapping[str, str] | Sequence[str],
    *,
    max_words: int | None = 1000,
    min_documents: int = 5,
    max_share: float = 0.5,
    stop_words: str | Sequence[str] | None = "english",
) -> WordCounts:
    """Count words of three letters or more, in lower case, with scikit-learn's CountVectorizer.

    A document without any of the words has a row of zeros.

    Args:
        texts: documents, by name or in order.
        max_words: largest number of words, of which the most frequent are kept; None for all.
        min_documents: words in fewer documents are dropped.
        max_share: words in a larger share of the documents are dropped.
        stop_words: words to drop; ``"english"`` is scikit-learn's list, None drops none.

    Raises:
        ValueError: if no words are left.
    """
    from sklearn.feature_extraction.text import CountVectorizer

    named = texts if isinstance(texts, Mapping) else {str(n): t for n, t in enumerate(texts)}
    counter = CountVectorizer(
        stop_words=stop_words
        if stop_words is None or isinstance(stop_words, str)
        else [*stop_words],
        token_pattern=r"(?u)\b[^\W\d_]{3,}\b",
        max_features=max_words,
        min_df=check_int("min_documents", min_documents),
        max_df=max_share,
    )
    try:
        counts: Any = counter.fit_transform(named.values())
    except ValueError as error:
        raise ValueError(
            f"no words are left of {len(named)} texts with min_documents={min_documents} and "
            f"max_share={max_share}: {error}"
        ) from error
    words = tuple(counter.get_feature_names_out().tolist())
    return WordCounts(torch.from_numpy(counts.toarray().astype(np.float32)), words, tuple(named))
