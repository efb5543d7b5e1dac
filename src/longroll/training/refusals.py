"""Refusals by the options of a run and the config of its model, before anything is read or written."""

from __future__ import annotations

from longroll.errors import LongrollError, first_line
from longroll.families._rope import RopeScaling, scaled_rope
from longroll.model import RecurrentLM
from longroll.training.graphs import check_device
from longroll.training.lora import check_adapters
from longroll.training.options import PosttrainOptions, trains_on
from longroll.training.weights import check_decay_speed, not_trained


def check_settings(lm: RecurrentLM, options: PosttrainOptions, *, intervenes: bool) -> None:
    """Refuse a run that could not be, by its options and the model's config alone.

    Args:
        lm: the model.
        options: the options; what a recipe sets may still be None.
        intervenes: whether sequences start from other than zero states.

    Raises:
        LongrollError: naming the option that does not go with the model, or with another option.
    """
    check_recurrent(lm, intervenes=intervenes)
    check_adapters(lm, options.lora_rank)
    _check_trained(lm, options)
    if options.rope_scaling is not None:
        if not lm.has_attention:
            raise LongrollError(
                f"{lm.model.config.model_type} has no attention whose positions could be scaled: leave "
                "`rope_scaling` out."
            )
        with scaled_rope(lm.model, RopeScaling.parse(options.rope_scaling), options.length):
            pass
    if options.gradient_checkpointing and not getattr(lm.model, "supports_gradient_checkpointing", True):
        try:
            lm.model.gradient_checkpointing_enable()  # which says why not
        except ValueError as error:
            raise LongrollError(f"`gradient_checkpointing`: {first_line(error)} Leave it out.") from None
    if options.cuda_graphs:
        check_device(trains_on(lm, options))
    if options.until_healthy and options.fsdp:
        raise LongrollError(
            "`until_healthy` does not go with `fsdp`, whose weights are not whole on any rank: leave one "
            "out, and with `fsdp` run longroll diagnose on the result."
        )


def check_recurrent(lm: RecurrentLM, *, intervenes: bool) -> None:
    """Refuse an intervention on a model that has no recurrent state.

    Raises:
        LongrollError: naming the kind of the model.
    """
    if intervenes and not lm.family.recurrent:
        raise LongrollError(
            f"{lm.model.config.model_type} has no recurrent state, so there is none to intervene on: train "
            "it by `intervention` none."
        )


def _check_trained(lm: RecurrentLM, options: PosttrainOptions) -> None:
    """Refuse options by which nothing would be trained, or none of what an option is about."""
    adapted = lm.adapted is not None
    if adapted or not options.lora_rank:
        not_trained(lm.adapted or lm.model, options.trainable or "all")
    check_decay_speed(options.decay_speed or 1.0, lm.model, frozen=bool(options.lora_rank) and not adapted)
