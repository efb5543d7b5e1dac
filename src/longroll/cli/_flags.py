"""Errors and notices of the library name Python's arguments; a command's name its flags."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import typer
from typer.core import TyperCommand

from longroll.cli._panels import into_panels
from longroll.errors import LongrollError

ALIASES = {
    "count": ("sequences",),
    "length": ("train_length", "lengths"),
    "name_or_path": ("tokenizer",),
    "source": ("facts", "text"),
    "std": ("noise_std",),
    "tokens.shape[0]": ("sequences",),
    "tokens.shape[1]": ("length", "lengths"),
}
"""Parameters of commands that hand over a value under another name than the library's."""


running: dict[str, str] = {}
"""The flags of the command that runs, by parameter; notices of the library are told in them too."""


def in_flags(message: str, flags: Mapping[str, str]) -> str:
    """Write flags in place of the Python arguments that a message names in backticks.

    Args:
        message: the message of a LongrollError, or a notice.
        flags: the flags of the command, by parameter; an argument that no parameter sets stays as it is.
    """

    def flag(match: re.Match[str]) -> str:
        name = match[1]
        return next((flags[key] for key in (name, *ALIASES.get(name, ())) if key in flags), match[0])

    return re.sub(r"`([\w.\[\]]+)`", flag, message)


UsageError: Any = typer.BadParameter.__bases__[0]  # typer has no public name for it


def in_one_line(error: Any) -> str:
    """Return what typer says of a wrong command line, and whose --help explains it."""
    said = " ".join(error.format_message().split()).rstrip(".")
    return f"{said} (see {error.ctx.command_path} --help)" if error.ctx else said


_SIZES = ("batch_size", "sequences", "samples", "chunk_size", "length", "lengths")
"""Parameters whose smaller values take less memory."""


def too_little_memory(error: BaseException, flags: Mapping[str, str]) -> str:
    """Return one line for a lack of memory: what was asked for, and the flags that take less.

    Args:
        error: what `longroll.errors.out_of_memory` is true of.
        flags: the flags of the command, by parameter.
    """
    smaller = [flags[name] for name in _SIZES if name in flags]
    advice = f"take a smaller {', '.join(smaller)}" if smaller else "take smaller files"
    advice += ", or --dtype bfloat16" if "dtype" in flags else ""
    asked = " ".join(str(error).split())[:200]
    return f"Out of memory: {advice}." + (f" ({asked})" if asked else "")


def unread(
    context: typer.Context, chosen: str, value: str | None, readers: Mapping[str, Collection[str | None]]
) -> list[str]:
    """Say which flags of the command line the value of another flag does not read, a sentence each.

    Args:
        context: the context of the command.
        chosen: the parameter whose value decides, `task` or `intervention`.
        value: its value.
        readers: the values that read each parameter.
    """
    flags = {param.name: param.opts[0] for param in context.command.params}
    said = []
    for name, values in readers.items():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE" and value not in values:
            read = [f"{flags[chosen]} {reader}" if reader else "training on text" for reader in values]
            here = f"has {flags[chosen]} {value}" if value else "trains on text"
            said.append(f"{flags[name]} belongs to {' or '.join(sorted(read))}, and this run {here}")
    return said


class Command(TyperCommand):
    """A command whose errors are LongrollErrors that name its flags, and whose help has panels."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        into_panels(self.params)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the flags.

        Raises:
            LongrollError: for an unknown or missing flag, and a value that is not allowed.
        """
        try:
            left = super().parse_args(ctx, args)
        except UsageError as error:
            raise LongrollError(in_one_line(error)) from None
        for param in self.params:
            value = ctx.params.get(param.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise LongrollError(f"{param.opts[0]} {value} is no number: give a finite one.")
        return left

    def invoke(self, ctx: Any) -> Any:
        """Run the command.

        Raises:
            LongrollError: of the library, in flags.
        """
        running.clear()
        running.update((p.name, p.opts[0]) for p in self.params if p.param_type_name == "option")
        try:
            return super().invoke(ctx)
        except LongrollError as error:
            error.args = (in_flags(str(error), running),)
            raise
