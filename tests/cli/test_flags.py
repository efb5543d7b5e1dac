"""The library's errors name Python's arguments, the commands' errors name their flags."""

import ast
import re
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import longroll
from longroll.cli import app
from longroll.cli._flags import in_flags
from longroll.cli._numbers import parse_length
from longroll.training import PosttrainOptions

SOURCE = Path(longroll.__file__).parent
FLAG = re.compile(r"(?<![\w-])--[a-z]")


def strings(tree: ast.AST):
    """String constants of a module but its docstrings and whole words of a command line."""
    documented = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented:
            yield node


def test_only_the_command_line_speaks_of_flags():
    told = []
    for path in SOURCE.rglob("*.py"):
        if path.is_relative_to(SOURCE / "cli") or path.name.startswith("harness"):
            continue  # the harness speaks of lm_eval's flags
        for node in strings(ast.parse(path.read_text())):
            text = re.sub(r"`longroll [^`]*`", "", node.value)  # a whole command is no flag
            if FLAG.search(text) and not re.fullmatch(r"--[a-z-]+", text):
                told.append(f"{path.relative_to(SOURCE)}:{node.lineno}: {node.value}")
    assert told == [], "name the argument in backticks, which the command line turns into its flag"


def commands():
    group = typer.main.get_command(app)
    groups = [group, *(c for c in group.commands.values() if hasattr(c, "commands"))]
    return [c for g in groups for c in g.commands.values() if not hasattr(c, "commands")]


@pytest.mark.parametrize("command", commands(), ids=lambda command: command.name)
def test_each_argument_becomes_its_flag(command):
    flags = {param.name: param.opts[0] for param in command.params if param.param_type_name == "option"}
    for name, flag in flags.items():
        assert in_flags(f"`{name}` 0 must be above 0.", flags) == f"{flag} 0 must be above 0."
    assert in_flags("`no_such_thing`", flags) == "`no_such_thing`"


@pytest.mark.parametrize(
    ("argument", "flag", "value"),
    [("learning_rate", "--learning-rate", 0.0), ("warmup", "--warmup", 2.0), ("clip", "--clip", -1.0)],
)
def test_python_reads_the_argument_and_the_terminal_the_flag(argument, flag, value, tmp_path):
    with pytest.raises(longroll.LongrollError, match=f"^`{argument}` {value} must|^`{argument}` {value} is"):
        PosttrainOptions(length=8, **{argument: value})
    ran = CliRunner().invoke(app, ["posttrain", "specimen", "--output", str(tmp_path), flag, str(value)])
    assert str(ran.exception).startswith(f"{flag} {value} ")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["diagnose", "specimen", "--length", "12z"], "--length.*'12z'.*longroll diagnose --help"),
        (["diagnose", "specimen", "--chunk-size", "0"], "--chunk-size.*'0' is less than 1"),
        (["evaluate", "passkey", "specimen", "--lengths", "1k,,2k"], "--lengths 1k,,2k"),
        (["posttrain", "specimen"], "Missing option '--output'"),
        (["diagnose", "specimen", "--sequence", "4"], "--sequences"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments, named):
    error = CliRunner().invoke(app, arguments, prog_name="longroll").exception
    assert isinstance(error, longroll.LongrollError)
    assert re.search(named, str(error)) and "\n" not in str(error)


@given(st.integers(0, 1 << 40))
def test_lengths_are_read_in_every_spelling(number):
    assert parse_length(str(number), minimum=0) == number
    assert parse_length(f"{number}k", minimum=0) == parse_length(f"{number}K", minimum=0) == number << 10
    assert parse_length(f" {number}M ", minimum=0) == number << 20
    assert parse_length(f"{number}.5k", minimum=0) == (number << 10) + 512


@pytest.mark.parametrize("text", ["", "k", "1.3", "-1", "nan", "inf", "1e3", "1kk", "0x10", "1.0001k", "٣"])
def test_what_is_no_length_is_refused(text):
    with pytest.raises(typer.BadParameter):
        parse_length(text)


def test_every_flag_of_a_command_has_a_panel():
    root = typer.main.get_command(app)
    commands = {name: c for name, c in root.commands.items() if not hasattr(c, "commands")}
    commands |= root.commands["evaluate"].commands
    for name, command in commands.items():
        if name != "lm-eval":  # its help is lm_eval's
            for option in command.params:
                known = (
                    option.param_type_name == "argument" or option.name == "help" or option.rich_help_panel
                )
                assert known, f"{name} --{option.name}: name its panel in cli/_panels.py"


def test_the_help_of_posttrain_has_its_panels_in_order(capsys):
    with pytest.raises(SystemExit):
        app(["posttrain", "--help"])
    told = capsys.readouterr().out
    places = [
        told.index(f"─ {panel} ─") for panel in ("Data", "Intervention", "Optimisation", "Hardware", "Output")
    ]
    assert places == sorted(places)
