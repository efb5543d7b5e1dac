"""The staggered remembrance map against K separate forwards: wall time and agreement.

    python benchmarks/remembrance.py --json remembrance.json

Both read the same suffixes from the zero state with the same model in chunks; the separate forwards keep the
last hidden state only, as a careful user would write them. Rounds alternate; the smallest time counts.
"""

import argparse
import statistics
import time

import torch

import longroll
from longroll.measure.distances import head_distance
from longroll.measure.remembrance import remembrance_map
from longroll.measure.roll_out import roll_out
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
    last = []
    for start in starts:
        for chunk in roll_out(lm, tokens[:, start:]):
            hidden = chunk.hidden
        last.append(hidden[:, -1])
    return head_distance(lm, last[0], torch.stack(last), "tv").mean(dim=1)


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
        "separate": lambda: separately(lm, tokens, starts),
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
    ratio = min(seconds["staggered"]) / min(seconds["separate"])
    result = {
        "kind": "benchmark",
        "what": "remembrance",
        "model": lm.name,
        "length": options.length,
        "starts": options.starts,
        "rows": options.rows,
        "seconds": seconds,
        "median_ratio": statistics.median(seconds["staggered"]) / statistics.median(seconds["separate"]),
        "ratio": ratio,
        "target": TARGET,
        "met": ratio <= TARGET,
        "largest_difference": (found["staggered"] - found["separate"]).abs().max().item(),
        "provenance": provenance(lm, seed=0, seconds=time.perf_counter() - began),
    }
    if options.json:
        write_json(options.json, result)
    print(
        f"{lm.name}: {options.starts} starts, T = {options.length}, {options.rows} row(s): staggered "
        f"{min(seconds['staggered']):.2f} s, separate {min(seconds['separate']):.2f} s, ratio {ratio:.2f} "
        f"(target {TARGET}); largest difference {result['largest_difference']:.1e}"
    )


if __name__ == "__main__":
    main()
