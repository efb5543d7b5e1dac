"""State tracking with and without interventions: word problems of four groups, trained short, read long.

    python recipes/tracking.py --workers 14 --output tracking

For each family, group, initial state and seed a model is trained from scratch on words of T - 1 elements
(`longroll.tasks.TrackingRows`), and told apart at T to 64 T by `tagged` and `free` accuracy. With `sp` every
row begins from the final state of another row and has to reset at the start token. Guessing is right once in
as many times as the group has elements: parity .5, Z5 .2, S3 .17, S5 .008. OUTPUT/tracking.json: every run,
and means and standard deviations over seeds.
"""

import timed  # isort: skip  (its clock starts first)

import argparse
import multiprocessing
import statistics
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

from longroll import RecurrentLM, StatePassing
from longroll.data import HFTokenizer
from longroll.families.fla_models.rwkv7 import RWKV7Config, RWKV7ForCausalLM
from longroll.results import provenance, write_json
from longroll.tasks import Row, StateTracking, TrackingRows, evaluate_grid, tracking_tokenizer

GROUPS = ("parity", "z5", "s3", "s5")
_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def mamba2(vocabulary: int, size: int) -> Any:
    """Mamba-2 of two layers: its decays are positive, so that it can track no parity at every length."""
    return Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=vocabulary, hidden_size=size, num_hidden_layers=2, state_size=64, head_dim=32,
            num_heads=2 * size // 32, n_groups=1, chunk_size=64, tie_word_embeddings=True, **_TOKENS,
        )
    )  # fmt: skip


def rwkv7(vocabulary: int, size: int) -> Any:
    """RWKV-7 of two layers: its transitions have negative eigenvalues (Peng et al. 2025)."""
    return RWKV7ForCausalLM(
        RWKV7Config(vocab_size=vocabulary, hidden_size=size, num_hidden_layers=2, head_dim=32, **_TOKENS)
    )


FAMILIES = {"mamba2": mamba2, "rwkv7": rwkv7}


def try_one(job: tuple[int, str, str, str]) -> dict[str, Any]:
    """Train and measure one model."""
    seed, family, group, way = job
    options, began = _options, time.perf_counter()
    tokenizer = HFTokenizer(tracking_tokenizer(), "tracking")
    task = StateTracking(tokenizer, group)
    torch.manual_seed(seed)
    model = FAMILIES[family](tokenizer.vocab_size, options.size)
    model.config.train_length = options.length
    lm = RecurrentLM(model.to(options.device), name=family)
    rows = TrackingRows([task], options.length, options.steps * options.batch, seed=seed)
    stored = timed.StoredRows(rows, min(options.kept, len(rows)), lanes=options.batch)
    intervention = StatePassing(seed=seed) if way == "sp" else None
    told = timed.train(
        lm, stored, intervention, options.output / "-".join(map(str, job)), seconds=None, steps=options.steps,
        length=options.length, batch_size=options.batch, learning_rate=options.learning_rate, seed=seed,
    )  # fmt: skip
    lengths = [times * options.length - 2 for times in (1, 2, 4, 16, 64) if times <= options.times]
    cells = evaluate_grid(
        lm.eval(), [Row(group, task)], lengths, samples=options.samples, batch_size=options.samples
    )
    accuracy = [
        [cell["length"], *(cell["scores"][name]["mean"] for name in ("tagged", "free"))] for cell in cells
    ]
    print(*job, accuracy, f"{time.perf_counter() - began:.0f} s", flush=True)
    return {
        "family": family, "group": group, "intervention": way, "seed": seed, "accuracy": accuracy,
        "training": told, "seconds": time.perf_counter() - began,
    }  # fmt: skip


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of each accuracy."""
    rows = []
    for key in dict.fromkeys((run["family"], run["group"], run["intervention"]) for run in runs):
        some = [run for run in runs if (run["family"], run["group"], run["intervention"]) == key]
        columns = []
        for cells in zip(*(run["accuracy"] for run in some), strict=True):
            scores = [[cell[i] for cell in cells] for i in (1, 2)]
            columns.append(
                [cells[0][0], *(f(s) for s in scores for f in (statistics.mean, statistics.pstdev))]
            )
        rows.append(dict(zip(("family", "group", "intervention"), key, strict=True)) | {"accuracy": columns})
    return rows


def _begin(options: argparse.Namespace) -> None:
    global _options
    torch.set_num_threads(1)
    _options = options


def main() -> None:
    """All runs, several at a time; the file is whole after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--groups", nargs="+", default=list(GROUPS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", type=int, default=128, help="d_model")
    parser.add_argument("--length", type=int, default=64, help="T")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--kept", type=int, default=30_000, help="rows made beforehand")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--times", type=int, default=64, help="longest word, in training lengths")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    jobs = list(product(range(options.seeds), options.families, options.groups, ("none", "sp")))
    runs: list[dict[str, Any]] = []
    lm = RecurrentLM(mamba2(128, 32).to(options.device), name="several")
    with multiprocessing.get_context("spawn").Pool(options.workers, _begin, (options,)) as pool:
        for run in pool.imap_unordered(try_one, jobs):
            runs.append(run)
            settings = {name: value for name, value in vars(options).items() if name != "output"}
            made = provenance(lm, seed=0, seconds=time.time() - timed.BEGAN)
            whole = {"settings": settings, "summary": summary(runs), "runs": runs, "provenance": made}
            write_json(options.output / "tracking.json", whole)


if __name__ == "__main__":
    main()
