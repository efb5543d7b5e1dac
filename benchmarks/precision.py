"""Loss of the specimen by position to 64k in float16 and bfloat16, beside float32 and transformers' float16.

    python benchmarks/precision.py --json benchmarks/results/precision.json

A difference is that of the mean loss over an octave of positions, in nats; the largest is of one text in one
octave. transformers reads one text in one forward.
"""

import argparse
import itertools
import time

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import longroll
from longroll.data import ByteTokenizer, Corpus, long_sequences
from longroll.locate import SPECIMEN
from longroll.measure.precision import Float16Watch

DTYPES = ("float32", "bfloat16", "float16")


def octaves(length: int) -> list[tuple[int, int]]:
    """Runs of positions [start, stop): the training length, then each doubling of it."""
    edges = [128 * 2**i for i in range(length.bit_length()) if 128 * 2**i <= length]
    return [(0, edges[0]), *itertools.pairwise(edges)]


@torch.no_grad()
def transformers_losses(tokens: Tensor, dtype: str) -> Tensor:
    """Losses of transformers' own full forward, (B, L)."""
    model = AutoModelForCausalLM.from_pretrained(SPECIMEN, dtype=dtype)
    logits = model(tokens[:, :-1]).logits.float()
    return torch.nn.functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--length", type=int, default=65_536)
    parser.add_argument("--texts", type=int, default=4)
    arguments = parser.parse_args()
    began, length = time.perf_counter(), arguments.length
    corpus = Corpus.from_source(
        "stdlib", ByteTokenizer(), split="validation", max_tokens=2 * arguments.texts * (length + 1)
    )
    tokens = long_sequences(corpus, length, arguments.texts, concatenate=True)
    losses, activations = {}, None
    for dtype in DTYPES:
        lm = longroll.load("specimen", device="cpu", dtype=dtype)
        with Float16Watch(lm) as watch:
            losses[dtype] = longroll.position_loss(lm, tokens).losses
        activations = watch.largest()
    losses["float16, transformers"] = transformers_losses(tokens[:1], "float16")
    rows = {}
    for name, found in losses.items():
        means = {
            dtype: torch.stack([x[: len(found), a:b].double().mean(1) for a, b in octaves(length)], 1)
            for dtype, x in (("here", found), ("float32", losses["float32"]))
        }
        apart = means["here"] - means["float32"]
        rows[name] = {
            "texts": len(found),
            "loss": means["here"].mean(0).tolist(),
            "difference": apart.mean(0).tolist(),
            "largest_difference": apart.abs().amax().item(),
            "not_finite": int((~found.isfinite()).sum()),
        }
    print("positions        " + "".join(f"{name:>24}" for name in rows))
    for i, (start, stop) in enumerate(octaves(length)):
        cells = "".join(f"{row['loss'][i]:15.4f} {row['difference'][i]:+8.4f}" for row in rows.values())
        print(f"{start:>7}-{stop:<7}  {cells}")
    print(f"largest float16 activation: {activations[0]:,.0f} in {activations[1]}")
    if arguments.json:
        from longroll.results import BenchmarkResult, provenance

        result = {
            "what": "precision",
            "octaves": octaves(length),
            "runs": rows,
            "largest_float16_activation": activations[0],
            "provenance": provenance(seed=0, seconds=time.perf_counter() - began),
        }
        BenchmarkResult.from_json(result).write(arguments.json)


if __name__ == "__main__":
    main()
