"""Hook of mkdocs: the page of the command line, made from the commands themselves."""

from __future__ import annotations

import html
import re
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from longroll.cli import app


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add cli.md."""
    files.append(File.generated(config, "cli.md", content=page()))
    return files


def page() -> str:
    """Return the page: each command, its options by panel, with defaults."""
    root: Any = typer.main.get_command(app)
    lines = ["# Command line", "", "`--help` prints the same on a terminal. Options before the command:", ""]
    lines += _options(root)
    for name, command in root.commands.items():
        if hasattr(command, "commands"):
            for inner, each in command.commands.items():
                lines += _command(f"{name} {inner}", each)
        else:
            lines += _command(name, command)
    return "\n".join(lines) + "\n"


def _command(name: str, command: Any) -> list[str]:
    help_text = re.sub(r"\s+", " ", command.help or "").strip()
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    usage = " ".join([f"longroll {name}", *[(p.name or "").upper() for p in arguments], "[OPTIONS]"])
    return ["", f"## longroll {name}", "", help_text, "", f"```text\n{usage}\n```", "", *_options(command)]


def _options(command: Any) -> list[str]:
    panels: dict[str, list[Any]] = {}
    for parameter in command.params:
        if parameter.param_type_name == "option" and not parameter.hidden and parameter.name != "help":
            panels.setdefault(getattr(parameter, "rich_help_panel", None) or "Options", []).append(parameter)
    lines = []
    for panel, parameters in panels.items():
        lines += ["", f"**{panel}**", ""] if len(panels) > 1 else [""]
        lines += ["| option | meaning | default |", "|---|---|---|"]
        for p in parameters:
            flags = ", ".join(f"`{flag}`" for flag in [*p.opts, *p.secondary_opts])
            shown = p.default is not None and p.default is not False and not callable(p.default)
            default = getattr(p.default, "value", p.default) if shown else ""
            default = "required" if p.required else f"`{default}`" if shown else ""
            lines.append(f"| {flags} | {_cell(p.help)} | {default} |")
    return lines


def _cell(text: str | None) -> str:
    return html.escape(re.sub(r"\s+", " ", text or ""), quote=False).replace("|", "\\|")
