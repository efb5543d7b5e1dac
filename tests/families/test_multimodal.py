"""Checkpoints that also see: they open as their text model, with its numbers."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

import longroll
from zoo import EVERY, assert_close, tokens

VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "num_position_embeddings": 16,
}


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe", "qwen4_exp"])
@torch.no_grad()
def test_a_multimodal_checkpoint_opens_as_its_text_model(name, tmp_path):
    model_type, text = EVERY[name]
    config = AutoConfig.for_model(model_type.removesuffix("_text"), text_config=text, vision_config=VISION)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(tmp_path)
    lm = longroll.load(tmp_path, device="cpu")
    assert lm.model.config.model_type == model_type and lm.layers
    ids = tokens(1, 20).clamp_min(3)
    assert_close(lm(ids)[0], model(input_ids=ids, use_cache=False).logits, 2e-5)
