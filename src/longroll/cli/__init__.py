"""The command line: a table of command -> function, one file each."""

from __future__ import annotations

import sys

import typer

from longroll.cli._diagnose import diagnose
from longroll.cli._doctor import doctor
from longroll.cli._evaluate import app as evaluate
from longroll.cli._lm_eval import lm_eval
from longroll.cli._posttrain import posttrain
from longroll.cli._quickstart import quickstart
from longroll.cli._report import report
from longroll.errors import LongrollError

INTERRUPTED = 130  # typer's exit status after Ctrl-C

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Keep recurrent language models working far past the length they were trained on.",
)
app.command("quickstart")(quickstart)
app.command("diagnose")(diagnose)
app.command("posttrain")(posttrain)
app.add_typer(evaluate, name="evaluate")
app.command(
    "lm-eval",
    add_help_option=False,  # lm_eval's own answers --help
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(lm_eval)
app.command("report")(report)
app.command("doctor")(doctor)


def main() -> None:
    """Run a command; a problem the user can mend is one line, not a traceback."""
    try:
        app()
    except LongrollError as error:
        sys.stderr.write(f"longroll: {error}\n")
        raise SystemExit(2) from None
    except SystemExit as end:
        if end.code == INTERRUPTED:
            sys.stderr.write("longroll: interrupted; what was written so far is kept.\n")
        raise
