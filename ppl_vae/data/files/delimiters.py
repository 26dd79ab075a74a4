"""What separates the cells of a text table."""

import re
from collections.abc import Sequence

from ppl_vae.data.files.file_content import quoted

DELIMITERS = {"tab": "\t", "semicolon": ";", "pipe": "|", "comma": ",", "space": " "}
"""Names of the delimiters that are detected."""
SAMPLE_LINES = 51
"""Number of lines, the header included, that guesses about a file are based on."""
SNIFFED_CHARACTERS, SNIFFED_LINES = 30_000, 5
"""Size of the sample that the delimiter is detected in, and the least number of its lines."""

LONGEST_WORD = 100
LONG_WORD = re.compile(rf'[^\s,;|"]{{{LONGEST_WORD + 1},}}')
"""Words that are shortened in the sample: the detection takes a time quadratic in their length."""


def delimiter_character(delimiter: str | None) -> str | None:
    """The character of a given delimiter, by itself or by its name; None if none is given.

    Raises:
        ValueError: if it is longer than one character.
    """
    character = DELIMITERS.get(delimiter or "", delimiter)
    if character is not None and (len(character) != 1 or character in '\n\r"'):
        raise ValueError(
            f"delimiter must be one character or one of {quoted(DELIMITERS)}; got {delimiter!r}"
        )
    return character


def delimiter_name(character: str) -> str:
    """The name of a delimiter, or the character itself in quotation marks."""
    return next((name for name, d in DELIMITERS.items() if d == character), repr(character))


def announced_delimiter(line: str) -> str | None:
    """The delimiter that a first line ``sep=;`` announces, as spreadsheets write and read it."""
    found = re.fullmatch(r'"?sep=(.)"?', line.strip(" "), re.IGNORECASE)
    return None if found is None else found[1]


def detect_delimiter(lines: Sequence[str]) -> str:
    """The delimiter of the first lines of a table, as detected by clevercsv.

    A table of a single column has none; a tab is returned then.

    References:
        van den Burg, Nazabal, Sutton: Wrangling messy CSV files by detecting row and type
        patterns (2019).
    """
    from clevercsv import Sniffer
    from clevercsv.exceptions import NoDetectionResult

    sample, size = [], 0
    for line in lines[:SAMPLE_LINES]:
        if len(sample) >= SNIFFED_LINES and size + len(line) > SNIFFED_CHARACTERS:
            break
        sample.append(LONG_WORD.sub(_shortened, line))
        size += len(line)
    try:
        dialect = Sniffer().sniff("\n".join(sample), delimiters=list(DELIMITERS.values()))
    except NoDetectionResult:
        return "\t"
    return (dialect.delimiter if dialect else "") or "\t"


def _shortened(word: re.Match[str]) -> str:
    return word[0][:LONGEST_WORD]
