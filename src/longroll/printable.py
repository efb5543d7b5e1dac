"""Text of others, made fit for a terminal, a page or a figure."""

import re

# control characters, halves of surrogate pairs, noncharacters, and what turns the direction of writing
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def printable(text: str) -> str:
    """Replace every control character by a space."""
    return _UNPRINTABLE.sub(" ", text)
