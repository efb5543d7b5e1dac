"""float16: what transformers reads with finite numbers, longroll does too, in pieces and with a state."""

import pytest
import torch

import zoo
from longroll.model import RecurrentLM

MAMBA2 = ["mamba2", "mamba2_groups", "bamba", "granitemoehybrid", "nemotron_h", "zamba2"]


def loud(name: str, scale: float):
    """A float16 model whose inputs to the recurrence are large, and which hardly forgets."""
    model = zoo.build(name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("A_log"):
                parameter.fill_(-8.0)
            elif "in_proj" in key and parameter.ndim == 2:
                parameter.mul_(scale)
    return model.half()


@pytest.mark.parametrize("scale", [16, 128])
@pytest.mark.parametrize("name", [*MAMBA2, "falcon_h1", "mamba", "jamba"])
@torch.no_grad()
def test_as_finite_as_transformers(name, scale):
    ids = zoo.tokens(2, 200)
    expected = loud(name, scale)(ids).logits
    lm, state, found = RecurrentLM(loud(name, scale)), None, []
    for piece in ids.split([90, 1, 109], dim=1):
        logits, state = lm(piece, state)
        found.append(logits)
    logits = torch.cat(found, dim=1)
    assert logits.isfinite().all() or not expected.isfinite().all()
    for key, tensor in state.part("recurrent").items():
        assert tensor.dtype == torch.float32, key
    if name in MAMBA2:
        assert expected.isfinite().all()
        zoo.assert_close(logits, expected.float(), 0.1)


def test_the_outputs_did_pass_the_limit():
    """The test above would be idle otherwise."""
    lm = RecurrentLM(loud("mamba2", 16).float())
    seen = []
    lm.model.backbone.layers[0].mixer.norm.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].abs().max().item())
    )
    with torch.no_grad():
        lm(zoo.tokens(2, 200))
    assert max(seen) > torch.finfo(torch.float16).max
