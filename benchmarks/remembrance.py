"""The staggered remembrance map against K separate forwards: wall time and agreement.

    python benchmarks/remembrance.py --json remembrance.json

Three ways, rounds alternating, the smallest time counts; all keep the last hidden states only.
`forwards`: K forwards of T tokens, the unit in which the cost is stated. `suffixes`: K forwards of x[t:T],
one piece each, as a careful user would write them; these hold as many tokens as the map, so against them
only batching tells, which is little on a CPU. `staggered`: ours.
"""

import argparse
import time

import torch

import longroll
from longroll.measure.distances import head_distance
from longroll.measure.remembrance import remembrance_map
from longroll.model import SPECIMEN, RecurrentLM
from longroll.results import provenance, write_json

TARGET = 0.6


def model_of(name: str | None) -> RecurrentLM:
    if name is not None or SPECIMEN.exists():
        return longroll.load(name or "specimen")
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=256, hidden_size=128, num_hidden_layers=3, state_size=128, head_dim=64, num_heads=4,
        n_groups=1, expand=2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return RecurrentLM(Mamba2ForCausalLM(config), name="random weights in the specimen's shape").eval()


@torch.no_grad()
def separately(lm: RecurrentLM, tokens: torch.Tensor, starts: list[int]) -> torch.Tensor:
    last = [lm(tokens[:, start:].to(lm.device), logits=False)[0][:, -1] for start in starts]
    return head_distance(lm, last[0], torch.stack(last), "tv").mean(dim=1)


@torch.no_grad()
def forwards(lm: RecurrentLM, tokens: torch.Tensor, starts: list[int]) -> torch.Tensor:
    for _ in starts:
        lm(tokens.to(lm.device), logits=False)
    return torch.zeros(len(starts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="default: the specimen, or random weights of its shape")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--starts", type=int, default=16)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json")
    options = parser.parse_args()
    began = time.perf_counter()
    lm = model_of(options.model)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(lm.vocab_size, (options.rows, options.length), generator=generator)
    starts = [i * options.length // options.starts for i in range(options.starts)]
    ways = {
        "forwards": lambda: forwards(lm, tokens, starts),
        "suffixes": lambda: separately(lm, tokens, starts),
        "staggered": lambda: remembrance_map(lm, tokens, starts).mean[:, 0],
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found = {}
    for _ in range(options.rounds):
        for name, way in ways.items():
            if lm.device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            found[name] = way().cpu().double()
            seconds[name].append(time.perf_counter() - start)
    best = {name: min(times) for name, times in seconds.items()}
    ratio = best["staggered"] / best["forwards"]
    result = {
        "kind": "benchmark",
        "what": "remembrance",
        "model": lm.name,
        "length": options.length,
        "starts": options.starts,
        "rows": options.rows,
        "seconds": seconds,
        "ratio": ratio,
        "ratio_suffixes": best["staggered"] / best["suffixes"],
        "target": TARGET,
        "met": ratio <= TARGET,
        "largest_difference": (found["staggered"] - found["suffixes"]).abs().max().item(),
        "provenance": provenance(lm, seed=0, seconds=time.perf_counter() - began),
    }
    if options.json:
        write_json(options.json, result)
    print(
        f"{lm.name}: {options.starts} starts, T = {options.length}, {options.rows} row(s): staggered "
        f"{best['staggered']:.2f} s; {ratio:.2f} of {options.starts} forwards (target {TARGET}), "
        f"{result['ratio_suffixes']:.2f} of the suffixes one by one; largest difference "
        f"{result['largest_difference']:.1e}"
    )


if __name__ == "__main__":
    main()
