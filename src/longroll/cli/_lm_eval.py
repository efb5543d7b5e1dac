"""`longroll lm-eval`: lm-evaluation-harness with longroll's model type."""

from __future__ import annotations

import typer

from longroll.cli import _options as o


def lm_eval(context: typer.Context, plugin: o.PluginName = None) -> None:
    """Run lm-evaluation-harness with the model type longroll: --model_args pretrained=MODEL."""
    from longroll.cli._console import hush_libraries, out
    from longroll.errors import LongrollError

    hush_libraries()
    if {"--help", "-h"} & set(context.args) or not context.args:
        from longroll.harness_arguments import help_text

        out.print(help_text(), highlight=False, soft_wrap=True)
    try:
        from longroll.harness import main
    except ImportError as error:
        raise LongrollError(
            f"longroll lm-eval needs lm-evaluation-harness ({error.name} is missing): pip install "
            "'longroll[lm-eval]'."
        ) from None
    main(context.args, plugin=plugin)
