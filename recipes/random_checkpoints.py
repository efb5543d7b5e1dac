"""Random weights in the layout of state-spaces' official checkpoints, to try `longroll reproduce` offline.

    python recipes/random_checkpoints.py mamba2-130m mamba-130m --output checkpoints
    longroll reproduce --models 130m --checkpoints checkpoints --tokenizer bytes --text books

`--layers` and `--width` make smaller ones under the same name. The file has the tensors, names and config of
the original; the weights are transformers' initialisation.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from longroll.reproduce import CHECKPOINTS, Checkpoint
from longroll.results import write_json


def write_checkpoint(one: Checkpoint, folder: Path, *, width: int, layers: int, seed: int = 0) -> Path:
    """Write `config.json` and `pytorch_model.bin` into folder/NAME, and return that folder."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": one.vocabulary, "hidden_size": width, "num_hidden_layers": layers}
    if one.family == "mamba2":
        heads = 2 * width // 64
        config = Mamba2Config(**sizes, num_heads=heads, head_dim=64, n_groups=1, tie_word_embeddings=True)
        model = Mamba2ForCausalLM(config)
    else:
        model = MambaForCausalLM(MambaConfig(**sizes))
    weights = {
        name.replace("backbone.embeddings.", "backbone.embedding."): tensor.clone()
        for name, tensor in model.state_dict().items()
    }
    weights["lm_head.weight"] = weights["backbone.embedding.weight"]
    place = folder / one.name
    place.mkdir(parents=True, exist_ok=True)
    torch.save(weights, place / "pytorch_model.bin")
    layout = {
        "d_model": width,
        "n_layer": layers,
        "vocab_size": 50_277,
        "ssm_cfg": {"layer": "Mamba2"} if one.family == "mamba2" else {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 16 if one.family == "mamba2" else 8,
    }
    write_json(place / "config.json", layout)
    return place


def main() -> None:
    """Write the checkpoints that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="+", choices=CHECKPOINTS)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--width", type=int, help="in place of the checkpoint's own")
    parser.add_argument("--layers", type=int, help="in place of the checkpoint's own")
    options = parser.parse_args()
    for name in options.names:
        one = CHECKPOINTS[name]
        width, layers = options.width or one.width, options.layers or one.layers
        print(write_checkpoint(one, options.output, width=width, layers=layers))


if __name__ == "__main__":
    main()
