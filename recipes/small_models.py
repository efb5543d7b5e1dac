"""Small models of other families, trained at T = 128 on real text, to break and to repair like the specimen.

    python recipes/small_models.py gla --output gla            # GLA, fla's architecture
    python recipes/small_models.py bamba --output hybrid       # Mamba-2, attention, Mamba-2

As in the specimen some of the recurrent heads (of GLA: of the key channels) can hardly forget, and how fast
heads forget is not trained; see recipes/README.md for what was measured.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from specimen import LENGTH, ORDINARY, SLOW, read_text, train
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    PreTrainedModel,
)

from longroll.families.fla.gla import GLAConfig, GLAForCausalLM

_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_SIZES = {"vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 3, "tie_word_embeddings": True}


def gla(slow: float) -> PreTrainedModel:
    """GLA whose first key channels decay by e^-.0002 a step, the others by .96 and as the input says."""
    config = GLAConfig(**_SIZES, **_TOKENS, num_heads=2, expand_k=0.5, hidden_ratio=2)
    model = GLAForCausalLM(config)
    for name, module in model.named_modules():
        if name.endswith("gk_proj"):
            channels = round(slow * module[1].weight.shape[0])
            module[1].weight.data[:channels] = 0
            module[1].bias.data[:channels] = 6.0  # log sigmoid(6) / 16 = -.00015
            module[1].requires_grad_(False)
    return model


def bamba(slow: float) -> PreTrainedModel:
    """A hybrid: Mamba-2, attention with rotary positions, Mamba-2."""
    config = BambaConfig(
        **_SIZES,
        **_TOKENS,
        attn_layer_indices=[1],
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        mamba_n_heads=4,
        mamba_d_head=64,
        mamba_d_state=64,
        mamba_n_groups=1,
        mamba_chunk_size=LENGTH,
        max_position_embeddings=LENGTH,
    )
    return slow_heads(BambaForCausalLM(config), slow)


def granite(slow: float) -> PreTrainedModel:
    """The same in the shape of Granite 4, whose attention has no positions."""
    config = GraniteMoeHybridConfig(
        **_SIZES,
        **_TOKENS,
        layer_types=["mamba", "attention", "mamba"],
        position_embedding_type="nope",
        intermediate_size=256,
        shared_intermediate_size=256,
        num_local_experts=0,
        num_experts_per_tok=0,
        num_attention_heads=4,
        num_key_value_heads=2,
        mamba_n_heads=4,
        mamba_d_head=64,
        mamba_d_state=64,
        mamba_n_groups=1,
        mamba_chunk_size=LENGTH,
        max_position_embeddings=LENGTH,
    )
    return slow_heads(GraniteMoeHybridForCausalLM(config), slow)


def slow_heads(model: PreTrainedModel, slow: float) -> PreTrainedModel:
    """Fix Mamba-2's decay rates: the first heads hardly forget (as in specimen.py)."""
    random = np.random.default_rng(0)
    for name, rates in model.named_parameters():
        if name.endswith("A_log"):
            heads = len(rates)
            drawn = [random.uniform(*(SLOW if head < slow * heads else ORDINARY)) for head in range(heads)]
            rates.data.copy_(torch.tensor(drawn).log())
            rates.requires_grad_(False)
    return model


FAMILIES = {"gla": gla, "bamba": bamba, "granite": granite}


def main() -> None:
    """Read the text, train, save an HF checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--slow", type=float, default=0.5, help="share of heads (channels) slow to forget")
    parser.add_argument("--text", action="append", help='"stdlib", a folder of Python files; several times')
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    corpus = read_text(options.text or ["stdlib"])
    torch.manual_seed(options.seed)
    model: PreTrainedModel = FAMILIES[options.family](options.slow)
    print(f"{corpus.tokens / 1e6:.0f} MB, {model.num_parameters() / 1e6:.2f}M parameters", flush=True)
    model.config.train_length = LENGTH
    ids = torch.from_numpy(corpus.ids.astype(np.uint8)).to(options.device)
    train(model.to(options.device).train(), ids, options)
    model.eval().save_pretrained(options.output)


if __name__ == "__main__":
    main()
