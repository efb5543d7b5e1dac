"""The arguments of lm_eval's model type `longroll`: taken, dropped with a notice, or refused by name."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from longroll.errors import LongrollError

logger = logging.getLogger("longroll")

TAKEN = {
    "pretrained": 'a model folder, a hub id, an RWKV .pth file, or "specimen"',
    "tokenizer": 'a tokenizer folder, file or hub id, or "bytes"; default: the model\'s',
    "dtype": "float32, bfloat16, ...; default: float32 on a CPU, else the checkpoint's",
    "device": "cpu, cuda, cuda:1, ...; default: a GPU if there is one",
    "batch_size": 'prompts read together, or "auto" (the default of `longroll lm-eval`)',
    "max_batch_size": "the most that auto chooses; default 64",
    "add_bos_token": "begin prompts with BOS or not; default: as the tokenizer does",
    "prefix_token_id": "id that stands before a text scored from its beginning; default: BOS, else EOS",
    "trust_remote_code": "run code that comes with the model or the tokenizer",
    "plugin": "Python file or module that registers models of your own",
    "chunk_size": "tokens of a prompt in one forward; default: by memory",
    "think_end_token": "what ends the reasoning of a model; the answer is what follows it",
    "enable_thinking": "handed to the chat template",
    "chat_template_args": "handed to the chat template",
}
"""What `LongrollLM` takes, and what it means."""

DROPPED = {
    "max_length": "prompts of any length are read whole",
    "logits_cache": "common beginnings are always read once",
    "use_fast_tokenizer": "the tokenizer's own kind is used",
}
"""Arguments of `hf` that change nothing here, with the reason."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "backend": ("default", "causal"),
    "revision": ("main",),
    "subfolder": ("",),
    "truncation": (False,),
    "parallelize": (False,),
    "autogptq": (False,),
    "gptqmodel": (False,),
    "load_in_8bit": (False,),
    "load_in_4bit": (False,),
    "offload_folder": ("./offload",),
}
"""Arguments of `hf` at the values that mean what longroll does; at others they are refused."""

GREEDY: dict[str, tuple[Any, ...]] = {
    "do_sample": (False,),
    "temperature": (0,),
    "num_beams": (1,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "no_repeat_ngram_size": (0,),
}
"""Options of generation at the values that mean greedy decoding."""
WITHOUT_SAMPLING = frozenset({"top_p", "top_k", "min_p", "typical_p", "seed", "use_cache"})
"""Options of generation that change nothing without sampling."""


def check_others(others: Mapping[str, Any]) -> None:
    """Drop what changes nothing, with one notice, and refuse the rest.

    Args:
        others: arguments that `TAKEN` does not name.

    Raises:
        LongrollError: for an argument that longroll cannot honour; it lists those that it takes.
    """
    refused = [
        f"{name}={value}"
        for name, value in others.items()
        if name not in DROPPED and value not in (None, "None", *NEUTRAL.get(name, ()))
    ]
    if refused:
        raise LongrollError(
            f"--model_args {','.join(refused)}: longroll cannot honour that; it takes {', '.join(TAKEN)}."
        )
    if dropped := [f"{name} ({DROPPED[name]})" for name in others if name in DROPPED]:
        logger.warning("--model_args: %s: dropped.", ", ".join(dropped))


def check_generation(options: Mapping[str, Any]) -> None:
    """Check that options of generation, beside where it ends, mean greedy decoding.

    Raises:
        LongrollError: for an option that asks for something else.
    """
    for name, value in options.items():
        if name in ("until", "max_gen_toks") or name in WITHOUT_SAMPLING or value is None:
            continue
        if value not in GREEDY.get(name, ()):
            raise LongrollError(
                f"--gen_kwargs {name}={value}: longroll decodes greedily: ask for do_sample=False, "
                f"temperature=0, and leave {name} out."
            )


def help_text() -> str:
    """Return what `longroll lm-eval --help` says before lm_eval's own help."""
    width = max(map(len, TAKEN))
    lines = [f"  {name:{width}}  {meaning}" for name, meaning in TAKEN.items()]
    return "\n".join(
        [
            "lm-evaluation-harness with the model type longroll, which reads prompts of any length.",
            "--model longroll and --batch_size auto are the defaults. --model_args takes:",
            *lines,
            f"Arguments of hf: {', '.join(DROPPED)} are dropped with a notice, others refused by name.",
            "",
        ]
    )


def with_defaults(arguments: list[str]) -> list[str]:
    """Return the arguments of lm_eval with longroll's model type and batch size, unless others are named."""
    configured = any(_names(one, "--config", "-C") for one in arguments)
    if not arguments or configured or arguments[0] in ("ls", "validate"):
        return arguments
    added = [] if any(_names(one, "--model", "-M") for one in arguments) else ["--model", "longroll"]
    if not added and not _asks_for_longroll(arguments):
        return arguments
    if not any(_names(one, "--batch_size", "-b") for one in arguments):
        added += ["--batch_size", "auto"]
    return [*arguments, *added]


def _names(argument: str, long: str, short: str) -> bool:
    joined = argument.startswith(short) and not argument.startswith("--")
    return argument == long or argument.startswith(f"{long}=") or joined


def _asks_for_longroll(arguments: list[str]) -> bool:
    return "longroll" in arguments or any(one in ("--model=longroll", "-Mlongroll") for one in arguments)
