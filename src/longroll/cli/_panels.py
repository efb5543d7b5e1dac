"""The panels of --help: each flag belongs to one, in every command that takes it."""

from __future__ import annotations

from typing import Any

PANELS: dict[str, tuple[str, ...]] = {
    "Data": (
        "text", "text_column", "tokenizer", "bos", "train_length", "length", "lengths", "sequences",
        "concatenate", "task", "haystack", "instruction", "facts", "books", "qa", "kinds", "windows",
        "depths", "samples", "prompts", "few_shot", "chat_template", "needles", "hops", "groups", "pairs",
        "models", "family", "checkpoints", "seed", "trust_remote_code", "plugin",
    ),
    "Measurement": (
        "explain", "long", "families", "packing", "against", "control", "reading", "window", "what", "unit",
        "sweeps",
    ),
    "Intervention": (
        "intervention", "interventions", "recipe", "zero_probability", "conv", "noise_std", "momentum",
    ),
    "Optimisation": (
        "steps", "batch_size", "accumulation", "learning_rate", "decay_speed", "schedule", "warmup",
        "weight_decay", "clip", "lora_rank", "trainable", "force", "until_healthy", "price",
        "measure_steps", "rope_scaling", "on_not_finite",
    ),
    "Hardware": (
        "device", "dtype", "chunk_size", "bf16", "weights", "gradient_checkpointing", "cuda_graphs",
        "deterministic", "fsdp", "fsdp_config", "plan", "gpus", "memory",
    ),
    "Output": (
        "output", "json", "format", "push_to_hub", "report_to", "save_steps", "resume", "label", "card",
        "figures", "width", "font_size", "x", "y", "title", "markdown", "keep_models",
    ),
}  # fmt: skip
"""Flags by the name of their parameter; others stand under Options."""

_PANEL_OF = {name: panel for panel, names in PANELS.items() for name in names}


def into_panels(parameters: list[Any]) -> None:
    """Sort the options of a command by panel, and name the panel of each."""
    options = [p for p in parameters if p.param_type_name == "option"]
    for option in options:
        option.rich_help_panel = option.rich_help_panel or _PANEL_OF.get(option.name)
    order = [None, *PANELS]
    parameters.sort(key=lambda p: order.index(p.rich_help_panel) if p in options else -1)
