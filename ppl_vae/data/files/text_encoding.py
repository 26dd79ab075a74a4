"""The text of a file: its encoding is given, marked by a byte order mark, or UTF-8."""

import codecs

BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
"""Encodings by the marks that a file begins with; the mark of UTF-32 begins with one of UTF-16."""
BINARY_SIGNATURES = (
    b"PK\3\4",
    b"PAR1",
    b"\x93NUMPY",
    b"\x89HDF",
    b"\x89PNG",
    b"%PDF",
)
COMPRESSED = {b"\x1f\x8b": ".csv.gz", b"BZh": ".csv.bz2", b"\xfd7zXZ\0": ".csv.xz"}
"""How compressed files begin, and how their names end."""
MARKUP = ("<!doctype", "<html", "<?xml", "{", "[{")
"""Beginnings of pages and of JSON that are called tables."""
INSPECTED_BYTES = 4096
"""How much of a file is inspected for zero bytes, which mark an encoding of wide characters."""
EXAMPLE_ENCODING = "cp1252"
"""The encoding of Western European text that a message proposes."""


def decode_text(raw: bytes, name: str, encoding: str | None) -> tuple[str, list[str]]:
    """The text, with line ends as ``\\n`` and without a byte order mark, and notes on it.

    Args:
        raw: the content of a file.
        name: its name, for messages.
        encoding: the given encoding; None to detect it.

    Raises:
        ValueError: if the content is not text of this encoding, or the encoding is not known.
    """
    notes: list[str] = []
    if encoding is None:
        encoding = _marked_encoding(raw, name)
        if encoding is None and b"\0" in raw:
            encoding = _wide_encoding(raw, name)
            notes.append(f"encoding detected: {encoding}, without a byte order mark")
        encoding = encoding or "utf-8"
    try:
        text = str(raw, encoding)
    except LookupError as error:
        raise ValueError(
            f"encoding must be the name of an encoding of text, such as utf-8 or "
            f"{EXAMPLE_ENCODING}; got {encoding!r}"
        ) from error
    except UnicodeError as error:
        raise ValueError(_undecodable(raw, name, encoding, error)) from error
    text = text.lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if "\0" in text or text[:INSPECTED_BYTES].lstrip().lower().startswith(MARKUP):
        raise ValueError(_not_text(name))
    return text, notes


def _marked_encoding(raw: bytes, name: str) -> str | None:
    for start, suffix in COMPRESSED.items():
        if raw.startswith(start):
            raise ValueError(
                f"{name} is compressed, despite its name; give it a name that ends in {suffix}"
            )
    if raw.startswith(BINARY_SIGNATURES):
        raise ValueError(_not_text(name))
    return next((found for mark, found in BYTE_ORDER_MARKS.items() if raw.startswith(mark)), None)


def _wide_encoding(raw: bytes, name: str) -> str:
    """The encoding in which the zero bytes belong to characters of Latin script.

    Raises:
        ValueError: if the zero bytes fit no encoding.
    """
    start = raw[: INSPECTED_BYTES - len(raw[:INSPECTED_BYTES]) % 4]
    zeros = [start[k::4].count(0) / max(1, len(start[k::4])) for k in range(4)]
    patterns = {
        "utf-32-le": (0, 1, 1, 1),
        "utf-32-be": (1, 1, 1, 0),
        "utf-16-le": (0, 1, 0, 1),
        "utf-16-be": (1, 0, 1, 0),
    }
    for encoding, pattern in patterns.items():
        if all(abs(z - p) < 0.2 for z, p in zip(zeros, pattern, strict=True)):
            return encoding
    raise ValueError(_not_text(name))


def _not_text(name: str) -> str:
    return f"{name} is not a text table, despite its name; save the table as CSV"


def _undecodable(raw: bytes, name: str, encoding: str, error: UnicodeError) -> str:
    if not isinstance(error, UnicodeDecodeError):
        return f"{name} cannot be decoded as {encoding}: {error}"
    start = raw.rfind(b"\n", 0, error.start) + 1
    end = raw.find(b"\n", error.start)
    number = raw.count(b"\n", 0, error.start) + 1
    line = raw[start : end if end >= 0 else None][:80].decode(EXAMPLE_ENCODING, "replace").strip()
    return (
        f"{name} is not {encoding.upper()}: byte 0x{raw[error.start]:02x} in line {number}; give "
        f"its encoding, such as {EXAMPLE_ENCODING} (on the command line --encoding "
        f"{EXAMPLE_ENCODING}), in which the line reads {line!r}, or save it as UTF-8"
    )
