"""Texts as rows of word counts, and docstrings, which are texts that every installation has."""

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.feature_extraction.text import CountVectorizer
from torch import Tensor

from ppl_vae.core.validation import check_int


@dataclass(frozen=True)
class WordCounts:
    """How often each word stands in each document.

    Attributes:
        counts: (N, D).
        words: D of them, in alphabetical order.
        names: of the N documents.
    """

    counts: Float[Tensor, "N D"]
    words: tuple[str, ...]
    names: tuple[str, ...]

    def __repr__(self) -> str:
        total, empty = int(self.counts.sum()), int((self.counts.sum(1) == 0).sum())
        without = f", {empty} documents without any" if empty else ""
        n, d = self.counts.shape
        return f"WordCounts: {n} documents, {d} words that stand there {total} times{without}"


def count_words(
    texts: Mapping[str, str] | Sequence[str],
    *,
    max_words: int | None = 1000,
    min_documents: int = 5,
    max_share: float = 0.5,
    stop_words: str | Sequence[str] | None = "english",
) -> WordCounts:
    """Count words of three letters or more, in lower case, by scikit-learn's CountVectorizer.

    A document without any of the words keeps its row, of zeros.

    Args:
        texts: documents, by name or in order.
        max_words: D at most, the most frequent ones; None for all.
        min_documents: words in fewer documents are left out.
        max_share: words in a larger share of the documents are left out.
        stop_words: to leave out; ``"english"`` is scikit-learn's list, None leaves none out.

    Raises:
        ValueError: if no words are left.
    """
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


def docstrings(*modules: str, min_words: int = 40) -> dict[str, str]:
    """Texts that need no network: docstrings of what is public in modules, functions and classes.

    A docstring that stands at several names is taken once, at the first. Imports the modules.

    Args:
        modules: names, such as ``"torch.nn"``.
        min_words: shorter docstrings are left out.

    Returns:
        The text of each name, in the modules' order and then the alphabet's.

    Raises:
        ValueError: if a module is not installed, or has no such docstring.
    """
    found: dict[str, str] = {}
    for module in modules:
        texts = _docstrings_in(module, min_words)
        if not texts:
            raise ValueError(
                f"module {module!r} has no docstrings of {min_words} words; take another one, or "
                "a smaller min_words"
            )
        found |= texts
    first = {text: name for name, text in reversed(found.items())}
    return {name: text for name, text in found.items() if first[text] == name}


def _docstrings_in(module: str, min_words: int) -> dict[str, str]:
    try:
        inside = vars(importlib.import_module(module))
    except ImportError as error:
        raise ValueError(f"module {module!r} cannot be imported: {error}") from error
    public = {n: v for n, v in sorted(inside.items()) if n[0] != "_" and callable(v)}
    texts = {f"{module}.{name}": inspect.getdoc(value) or "" for name, value in public.items()}
    return {name: text for name, text in texts.items() if len(text.split()) >= min_words}
