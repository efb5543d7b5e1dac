"""Plug-ins: a module of the user's that registers families, or builds models by name."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from longroll.errors import LongrollError, named

Build = Callable[[str], Any]
"""`build(name) -> RecurrentLM | nn.Module | PreTrainedModel`."""


class Plugin:
    """A module that was imported, and the function in it that builds models, if one was named.

    Args:
        plugin: `my_module` or `my_module:build`, importable, from the current directory too; or the function.

    Raises:
        LongrollError: for a module that cannot be imported, and a name in it that is not a function.
    """

    def __init__(self, plugin: str | Build) -> None:
        self.name = plugin if isinstance(plugin, str) else getattr(plugin, "__name__", "build")
        self.build: Build | None = None if isinstance(plugin, str) else plugin
        self.flags: tuple[str, ...] | None = ("--plugin", plugin) if isinstance(plugin, str) else None
        if isinstance(plugin, str):
            module, _, function = plugin.partition(":")
            found = self._import(module)
            if function:
                self.build = getattr(found, function, None)
                if not callable(self.build):
                    raise LongrollError(f"`plugin` {plugin}: {module} has no function {function}.")

    def _import(self, module: str) -> Any:
        if module.endswith(".py") or "/" in module:
            dotted = module.removesuffix(".py").strip("./").replace("/", ".")
            raise LongrollError(f"`plugin` {self.name}: name the module as import does: {dotted}.")
        if (here := os.getcwd()) not in sys.path:
            sys.path.insert(0, here)
        with self._named():
            return importlib.import_module(module)

    def __call__(self, name: str) -> Any:
        """Return what `build` makes of a name."""
        assert self.build is not None
        with self._named():
            return self.build(name)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """One line, which names the plug-in, for whatever goes wrong in it."""
        try:
            yield
        except LongrollError as error:
            raise LongrollError(f"`plugin` {self.name}: {error}") from error
        except (Exception, SystemExit) as error:
            raise LongrollError(f"`plugin` {self.name} fails: {named(error)}") from error
