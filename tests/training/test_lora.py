"""Adapters sit on layers that are run, whatever the family, and merge into them."""

import pytest
import torch

from longroll.model import RecurrentLM
from longroll.training.lora import with_lora
from zoo import assert_close, build, tokens

FAMILIES = [
    "bamba",
    "gla",
    "gpt2",
    "kimi_linear",
    "minimax",
    "qwen3_next",
    "recurrent_gemma",
    "rwkv6",
    "rwkv7",
    "xlstm",
    "zamba",
    "zamba2",
]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_every_adapter_learns_and_merges(name):
    lm = RecurrentLM(build(name).train())
    model = with_lora(lm.model, 2)
    logits, _ = lm(tokens(2, 20))
    logits.float().logsumexp(-1).sum().backward()
    adapters = {key: p for key, p in model.named_parameters() if "lora_B" in key}
    assert adapters
    for key, parameter in adapters.items():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key
        parameter.data.normal_(std=0.1)
    with torch.no_grad():
        adapted, _ = lm.eval()(tokens(2, 20))
        lm.model = model.merge_and_unload()
        merged, _ = lm(tokens(2, 20))
    assert (adapted - logits).abs().max() > 1e-3
    assert_close(merged, adapted, 1e-3)
