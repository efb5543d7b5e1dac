"""Units of loss, and how numbers are written: 16384 as 16k, 3.0649 as 3.06."""

import re
from typing import Any

import numpy as np

from longroll.errors import LongrollError

UNITS = {
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "nats": "loss in nats per token",
}
DASH = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"
MISSING = DASH

_SUPERSCRIPT = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def convert(nats: Any, unit: str, bytes_per_token: float | None = None) -> Any:
    """Convert nats per token to a unit; what would overflow a float becomes NaN."""
    if unit == "nats":
        return np.asarray(nats, dtype=float)
    if unit == "perplexity":
        with np.errstate(over="ignore"):
            out = np.exp(np.asarray(nats, dtype=float))
        return np.where(np.isfinite(out), out, np.nan)
    if unit == "bits_per_byte":
        if not bytes_per_token:
            raise LongrollError(
                "Bits per byte need `bytes_per_token` in every run: choose perplexity or nats."
            )
        return np.asarray(nats, dtype=float) / np.log(2) / bytes_per_token
    raise LongrollError(f"Unknown unit {unit!r}: use one of {', '.join(UNITS)}.")


def position(value: float) -> str:
    """Write a position as the field does: 128, 1k, 16k, 1M, with k = 1024."""
    n = round(value)
    for size, letter in ((1 << 20, "M"), (1 << 10, "k")):
        if n >= size and n % (size // 2) == 0:
            return f"{n / size:g}{letter}"
    return f"{n:,}"


def span(start: float, stop: float) -> str:
    """Write the half-open range [start, stop)."""
    return position(start) if stop - start <= 1 else f"{position(start)}{DASH}{position(stop)}"


def quantity(value: float) -> str:
    """Write a value to three significant digits, without exponents while it stays readable."""
    if not np.isfinite(value):
        return MISSING
    size = abs(value)
    if size >= 1e6:
        exponent = int(np.floor(np.log10(size)))
        return f"{value / 10.0**exponent:.1f}{TIMES}10{str(exponent).translate(_SUPERSCRIPT)}"
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 0.1 or size == 0 else 3
    return minus(f"{value:,.{digits}f}")


def nats(value: float) -> str:
    """Write a loss in nats: two decimals."""
    return minus(f"{value:.2f}") if np.isfinite(value) else MISSING


def difference(value: float) -> str:
    """Write a signed difference with a true minus sign."""
    if not np.isfinite(value):
        return ""
    return minus(f"{value:+.2f}") if round(abs(value), 2) else "0.00"


def share(value: float) -> str:
    """Write a number in [0, 1] as a table of probabilities does: .63, 1.0."""
    if not np.isfinite(value):
        return ""
    text = f"{value:.2f}"
    return (
        "1.0" if text == "1.00" else "0" if text in ("0.00", "-0.00") else minus(text.replace("0.", ".", 1))
    )


def tick(value: float) -> str:
    """Write the number at an axis tick: 0.5, 20, 5k, 10⁶."""
    if value >= 1e6:
        exponent = int(np.floor(np.log10(value) + 1e-9))
        lead = round(value / 10.0**exponent)
        return ("" if lead == 1 else f"{lead}{TIMES}") + "10" + str(exponent).translate(_SUPERSCRIPT)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return minus(f"{value:.4g}")


def parameters(count: float) -> str:
    """Write a number of parameters: 440 thousand as 0.44M, 1.3 thousand million as 1.3B."""
    if count >= 1e9:
        return f"{count / 1e9:.3g}B"
    if count < 1e5:
        return f"{count:,.0f}"
    return f"{count / 1e6:.2g}M" if count < 1e7 else f"{count / 1e6:.0f}M"


def typeset(sentence: str) -> str:
    """Set ranges with a dash, "about" and "times" with their signs, none at a line break: 8k-16k, t ~ 212.

    Arguments of Python lose their backticks.
    """
    sentence = re.sub(r"(?<=\d[kM])-(?=\d)|(?<=\d)-(?=\d)", f"\N{WORD JOINER}{DASH}\N{WORD JOINER}", sentence)
    sentence = re.sub(r"(?<=\d) %", "\N{NO-BREAK SPACE}%", sentence)
    sentence = re.sub(r"(?<=\d) x (?=\d)", f" {TIMES} ", sentence)
    return sentence.replace("`", "").replace(" ~ ", "\N{NO-BREAK SPACE}\N{ALMOST EQUAL TO}\N{NO-BREAK SPACE}")


def minus(text: str) -> str:
    """Replace the hyphen by the minus sign."""
    return text.replace("-", "\N{MINUS SIGN}")
