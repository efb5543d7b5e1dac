"""What flags, config and text rule out is refused before the model is read."""

import pytest
from ranked import corpus_of
from typer.testing import CliRunner

from longroll import LongrollError, RecurrentLM
from longroll.cli import app
from longroll.conformance.tiny import build
from longroll.training import PosttrainOptions, posttrain


class Unread:
    """Held-out data that nobody may read."""

    fingerprint = "unread"

    def read(self, lm):
        raise AssertionError("the model was read")


RULED_OUT = {
    "no state": ("llama", "sp", {}, "llama has no recurrent state"),
    "no state, by the recipe": ("llama", "longroll", {}, "llama has no recurrent state"),
    "no decays": ("retnet", "sp", {"decay_speed": 5.0}, "`decay_speed`"),
    "adapters leave decays": ("mamba2", "sp", {"lora_rank": 2, "decay_speed": 5.0}, "`decay_speed`"),
    "nothing to train": ("retnet", "sp", {"trainable": "decays"}, "`trainable` decays"),
    "graphs on a CPU": ("mamba2", "sp", {"cuda_graphs": True}, "`cuda_graphs`"),
    "no positions": ("mamba2", "sp", {"rope_scaling": "yarn:2"}, "`rope_scaling`"),
    "a kind of positions": ("recurrent_gemma", "sp", {"rope_scaling": "yarn:2"}, "`rope_scaling`"),
    "no checkpointing": ("unsupported", "sp", {"gradient_checkpointing": True}, "`gradient_checkpointing`: "),
    "no whole weights": ("mamba2", "sp", {"until_healthy": True, "fsdp": True}, "torchrun|`fsdp`"),
    "original": ("gla", "sp", {"format": "original"}, "`format`"),
    "little text": ("mamba2", "tbptt", {"batch_size": 999}, "give more text"),
    "shorter than a row": ("mamba2", "sp", {"length": 9_999}, "`length`"),
}


@pytest.mark.parametrize("what", RULED_OUT)
def test_what_options_rule_out_is_refused_before_the_look(what, tmp_path):
    family, intervention, options, said = RULED_OUT[what]
    options = {"length": 8, "steps": 1, "batch_size": 2} | options
    lm = RecurrentLM(build("mamba2" if family == "unsupported" else family))
    if family == "unsupported":
        lm.model.supports_gradient_checkpointing = False
    before = {name: value.clone() for name, value in lm.model.named_buffers()}
    with pytest.raises(LongrollError, match=said):
        posttrain(
            lm, corpus_of(), intervention, PosttrainOptions(**options), tmp_path / "out", held_out=Unread()
        )
    assert not (tmp_path / "out").exists()
    assert all(value.equal(before[name]) for name, value in lm.model.named_buffers())


@pytest.mark.parametrize(
    ("family", "flags", "said"),
    [
        ("llama", (), "llama has no recurrent state, so there is none to intervene on: train it by --interv"),
        ("llama", ("--until-healthy",), "llama has no recurrent state"),
        ("retnet", ("--decay-speed", 5), "--decay-speed: no parameter that is trained"),
    ],
)
def test_the_command_refuses_before_it_names_a_recipe(family, flags, said, tmp_path):
    build(family, vocab_size=256).save_pretrained(tmp_path / "in")
    told = ["posttrain", tmp_path / "in", "--train-length", 8, "--output", tmp_path / "out", *flags]
    ran = CliRunner().invoke(app, [*map(str, told), "--device", "cpu"])
    assert isinstance(ran.exception, LongrollError) and said in str(ran.exception)
    assert "Recipe" not in ran.output and "Plan" not in ran.output and "alone" not in ran.output
