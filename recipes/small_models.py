"""Small models of other families, trained at T = 128 on real text, to break and to repair like the specimen.

    python recipes/small_models.py gla --output gla            # GLA, fla's architecture
    python recipes/small_models.py bamba --output hybrid       # Mamba-2, attention, Mamba-2
    python recipes/small_models.py gla --slow 1 --text books/train --validation books/valid --seconds 300 \
        --repair --output gla                                  # on a GPU

`--seconds` trains by the clock, counted from the start of the script, 256 rows a step in place of --batch,
through `longroll.training`. `--repair` trains the result on by State Passing and from zero states (`none`,
the control): 300 steps of 16 x 128, 1e-3, decays x 30, a tenth of the rows from zero; it diagnoses all
three and writes OUTPUT/{before,sp,none}.json.

As in the specimen some of the recurrent heads (of GLA: of the key channels) can hardly forget, and how fast
heads forget is not trained. Run on a CPU and, gla and granite with --slow 1, on an H200: there GLA breaks,
State Passing repairs it and the control does not; recipes/README.md, "Other families".
"""

import timed  # isort: skip  (its clock starts first)

import argparse
import time
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

from longroll import RecurrentLM, StatePassing, diagnose, load
from longroll.data import ByteTokenizer, Corpus, Windows, long_sequences, read_documents
from longroll.families.fla_models.gla import GLAConfig, GLAForCausalLM
from longroll.results import write_json

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


def repair(corpus: Corpus, options: argparse.Namespace) -> None:
    """Diagnose, repair by State Passing and by the control, diagnose again."""
    validation = options.validation or "stdlib"
    split = "all" if options.validation else "validation"
    texts = (text[: 4 * options.longest] for text in read_documents(validation, split=split))
    tokens = long_sequences(Corpus.from_texts(texts), options.longest, 8, seed=options.seed)
    ways = {"before": None, "sp": StatePassing(zero_probability=0.1, seed=options.seed), "none": None}
    for label, intervention in ways.items():
        began = time.time()
        lm = load(options.output, device=options.device)
        if label != "before":
            rows = Windows(corpus, LENGTH, seed=options.seed + 1, num_items=16 * options.repair_steps)
            timed.train(
                lm,
                rows,
                intervention,
                options.output / label,
                seconds=None,
                steps=options.repair_steps,
                length=LENGTH,
                batch_size=16,
                learning_rate=1e-3,
                decay_speed=30.0,
                seed=options.seed,
            )
        found = diagnose(lm, tokens, label=label, train_length=LENGTH).to_json()
        write_json(options.output / f"{label}.json", found)
        print(label, found["sentence"], f"{time.time() - began:.0f} s", flush=True)


def main() -> None:
    """Read the text, train, save an HF checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--slow", type=float, default=0.5, help="share of heads (channels) slow to forget")
    parser.add_argument("--text", action="append", help='"stdlib", a folder of Python files; several times')
    parser.add_argument("--validation", help="a folder of other texts: then --text is a folder of any texts")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--seconds", type=float, help="train by the clock")
    parser.add_argument("--repair", action="store_true", help="diagnose and repair, too")
    parser.add_argument("--repair-steps", type=int, default=300)
    parser.add_argument("--longest", type=int, default=16_384, help="bytes of the texts of the diagnosis")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if options.validation:
        corpus = Corpus.from_texts(read_documents(options.text[0], split="all"), ByteTokenizer())
    else:
        corpus = read_text(options.text or ["stdlib"])
    torch.manual_seed(options.seed)
    model: PreTrainedModel = FAMILIES[options.family](options.slow)
    print(f"{corpus.tokens / 1e6:.0f} MB, {model.num_parameters() / 1e6:.2f}M parameters", flush=True)
    model.config.train_length = LENGTH
    model = model.to(options.device)
    if options.seconds:
        how = {"length": LENGTH, "batch_size": 256, "learning_rate": options.learning_rate}
        how |= {"weight_decay": 0.1, "seed": options.seed}
        rows = Windows(corpus, LENGTH, seed=options.seed, num_items=10_000 * 256)
        told = timed.train(
            RecurrentLM(model), rows, None, options.output, seconds=options.seconds, steps=0, **how
        )
        write_json(options.output / "training.json", told)
    else:
        ids = torch.from_numpy(corpus.ids.astype(np.uint8)).to(options.device)
        train(model.train(), ids, options)
        model.eval().save_pretrained(options.output)
    if options.repair:
        repair(corpus, options)


if __name__ == "__main__":
    main()
