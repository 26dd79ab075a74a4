"""Numbers with their nouns, for messages and printed results."""

IRREGULAR_PLURALS = {"axis": "axes", "class": "classes", "entry": "entries"}


def counted(number: int, noun: str) -> str:
    """A number and the noun that agrees with it: "1 data point", "3 axes", "2 held-out rows".

    Args:
        number: at least zero.
        noun: in the singular; its last word is the one that changes.
    """
    if number == 1:
        return f"1 {noun}"
    start, space, last = noun.rpartition(" ")
    return f"{number} {start}{space}{IRREGULAR_PLURALS.get(last, f'{last}s')}"


def short_number(value: float) -> str:
    """A number with three decimals, or with three significant digits from one thousand on."""
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.3g}"
