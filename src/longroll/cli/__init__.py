"""The command line: a table of command -> function, one file each."""

from __future__ import annotations

import os
import sys
import traceback
from importlib.metadata import version
from typing import Annotated

import typer

from longroll.cli import _console
from longroll.cli._calibrate import calibrate
from longroll.cli._diagnose import diagnose
from longroll.cli._doctor import doctor
from longroll.cli._evaluate import app as evaluate
from longroll.cli._flags import Command, UsageError, in_one_line, running, too_little_memory
from longroll.cli._lm_eval import lm_eval
from longroll.cli._plan import plan
from longroll.cli._posttrain import posttrain
from longroll.cli._quickstart import quickstart
from longroll.cli._report import report
from longroll.cli._reproduce import reproduce
from longroll.errors import LongrollError, named, out_of_memory
from longroll.launcher import end_with_launcher, place
from longroll.printable import printable

INTERRUPTED = 130  # typer's exit status after Ctrl-C

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Keep recurrent language models working far past the length they were trained on.",
)
app.command("quickstart", cls=Command)(quickstart)
app.command("diagnose", cls=Command)(diagnose)
app.command("plan", cls=Command)(plan)
app.command("posttrain", cls=Command)(posttrain)
app.command("calibrate", cls=Command)(calibrate)
app.add_typer(evaluate, name="evaluate")
app.command(
    "lm-eval",
    add_help_option=False,  # lm_eval's own answers --help
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(lm_eval)
app.command("report", cls=Command)(report)
app.command("reproduce", cls=Command)(reproduce)
app.command("doctor", cls=Command)(doctor)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"longroll {version('longroll')}")
        raise typer.Exit


@app.callback()
def options(
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print results and errors only: no progress, no notices.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print what the libraries log, too.")
    ] = False,
) -> None:
    """Set the options that stand before the name of a command."""
    if quiet and verbose:
        raise LongrollError("--quiet and --verbose contradict each other: give one of them.")
    first = place()[0] == 0  # one rank speaks; each says its own errors
    _console.set_verbosity(-1 if quiet or not first else int(verbose))
    _console.out.quiet = not first


def main() -> None:
    """Run a command; an error that the user can correct is one line, not a traceback."""
    end_with_launcher()
    try:
        _run()
    except SystemExit as end:
        if not _several():
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        # gloo's threads sometimes abort an interpreter that ends in order (torch 2.13)
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))


def _run() -> None:
    try:
        status = app(prog_name="longroll", standalone_mode=False)
    except LongrollError as error:
        if error.told:
            raise SystemExit(2) from None
        _fail(str(error))
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help
            error.show()
            raise SystemExit(2) from None
        _fail(in_one_line(error))
    except Exception as error:
        if out_of_memory(error):
            _fail(too_little_memory(error, running))
        if not _several():
            raise
        from longroll.ranks import loss_of_another, tell

        if lost := loss_of_another(error):
            _fail(lost)
        tell(named(error))
        traceback.print_exc()
        raise SystemExit(1) from None  # an interpreter that ends in order ends after those that lose it
    if status == INTERRUPTED:
        sys.stderr.write("longroll: interrupted; what was written so far is kept.\n")
    raise SystemExit(status)


def _several() -> bool:
    """Return whether a launcher started other processes beside this one."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _fail(message: str) -> None:
    if _several():
        from longroll.ranks import tell

        tell(message)
    sys.stderr.write(f"longroll: {printable(message)}\n")
    raise SystemExit(2) from None
