"""The code in README and docs runs: Python as it stands, commands with the specimen and small sizes."""

import ast
import os
import re
import shlex
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
import typer

from longroll.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *ROOT.glob("*/README.md"),
    ROOT / "CONTRIBUTING.md",
]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
RUN = ("README.md", "docs/getting-started.md", "docs/contribute/intervention.md")
"""Pages whose Python runs from top to bottom."""
QUICK = {"max_tokens=100_000": "max_tokens=6_000", "2048, 8)": "512, 4)", "steps=20": "steps=1"}
"""Sizes that would take minutes."""
QUICK_COMMANDS = {
    "state-spaces/mamba2-370m": "specimen",
    "--tokenizer EleutherAI/gpt-neox-20b": "",
    "--train-length 2048": "--train-length 128",
    "--length 32k": "--length 300 --sequences 4 --concatenate",
    "--output repaired": "--steps 2 --output repaired",
    "--lengths 256,1k,16k": "--lengths 300 --samples 1",
}


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[str]:
    text = page.read_text()
    return [code for language, code in FENCE.findall(text) if language in languages]


def commands(page: Path) -> list[list[str]]:
    """The arguments of every longroll command in a page's shell blocks."""
    found = []
    for block in blocks(page, "bash", "shell"):
        for line in block.replace("\\\n", " ").split("\n"):
            words = shlex.split(line, comments=True)
            for start in ("longroll", "-m longroll"):
                ends = start.split()
                for i in range(len(words)):
                    if words[i : i + len(ends)] == ends and (i == 0 or ends[0] == "-m"):
                        found.append([word for word in words[i + len(ends) :] if word != "..."])
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name)
def test_python_in_pages_is_python(page):
    for block in blocks(page, "python"):
        if not block.lstrip().startswith('"'):  # rows of a table, shown alone
            ast.parse(block)


@pytest.mark.parametrize("page", RUN)
def test_python_runs_when_it_is_pasted(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    scope: dict = {"__name__": "snippet"}
    for block in blocks(ROOT / page, "python"):
        for long, short in QUICK.items():
            block = block.replace(long, short)
        exec(compile(block, page, "exec"), scope)
    if "lm" in scope:
        assert capsys.readouterr().out.strip()
        assert (tmp_path / "repaired/model.safetensors").is_file()


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name)
def test_commands_in_pages_have_flags_that_exist(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = typer.main.get_command(app)
    for arguments in commands(page):
        command, rest = root, arguments
        while hasattr(command, "commands") and rest and rest[0] in command.commands:
            command, rest = command.commands[rest[0]], rest[1:]
        assert command is not root or rest[0].startswith("-"), arguments
        flags = {flag for option in command.params for flag in [*option.opts, *option.secondary_opts]} | {
            "--help"
        }
        used = {word.split("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
        if arguments[0] != "lm-eval":  # its flags are lm_eval's
            assert used <= flags, f"{shlex.join(arguments)}: {used - flags}"


def test_commands_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    books = tmp_path / "my/books"
    books.mkdir(parents=True)
    library = Path(sysconfig.get_path("stdlib"))
    for file in ("argparse.py", "ast.py", "inspect.py", "tarfile.py", "turtle.py", "typing.py", "zipfile.py"):
        for copy in range(2):
            shutil.copy(library / file, books / f"{copy}{file}")
    ran = [a for a in commands(ROOT / "README.md") if a[0] in ("diagnose", "posttrain", "report", "evaluate")]
    assert len(ran) == 5
    for arguments in ran:
        line = shlex.join(arguments)
        for long, short in QUICK_COMMANDS.items():
            line = line.replace(long, short)
        assert app(shlex.split(line), standalone_mode=False) in (None, 0), line
    for made in ("before.json", "after.json", "repaired/config.json", "page", "figures", "passkey"):
        assert os.path.exists(made), made
