"""Train Mamba-2 to copy strings, from scratch, with and without State Passing (the paper's section 4).

    python recipes/copying.py --output copying                     # for a GPU
    python recipes/copying.py --small --seeds 0 --output copying   # minutes on one CPU core

Data, loss and both ways of scoring are those of sjelassi/transformers_ssm_copy (`longroll.tasks.copying`); so
are AdamW with weight decay .1, linear schedule, 100 steps of warm-up, clipping at 1. The paper does not give
the size of its model. For each run: OUTPUT/{intervention}-{seed}/ (the model and its tokenizer) and .json
(results, as of `longroll evaluate copying`); then OUTPUT/summary.json, means and standard deviations.
`--seconds` ends each training by the clock, counted from the start of the script. `--summary` writes the last
file from the results of runs in processes of their own (`--seeds 0 --interventions sp`, ...).

`--longest 16 --context 40 --slow` is a set-up where the state leaves its training range: a row holds one long
string or a few short ones, and no head forgets at first (decay rates A from .001 to .1).

Run on one H200 (six such processes, --seconds 250, beside 15 others): past the training length State Passing
copies worse than none, unlike in the paper; recipes/README.md, "Copying".
"""

import timed  # isort: skip  (its clock starts first)

import argparse
import statistics
import time
from pathlib import Path

import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

from longroll.data import HFTokenizer
from longroll.interventions import StatePassing
from longroll.model import RecurrentLM
from longroll.results import read_json, write_json
from longroll.tasks import Copying, CopyRows, Row, copying_tokenizer, evaluate_grid
from longroll.tasks.copying import VOCABULARY
from longroll.tasks.evaluate import task_result

LARGE = {
    "hidden": 256, "layers": 2, "state": 128, "context": 220, "shortest": 1, "longest": 32, "steps": 4000,
    "batch": 64, "learning_rate": 2e-3, "lengths": [8, 16, 24, 32, 48, 64, 96, 112, 128], "samples": 256,
    "kept": 65_536,
}  # fmt: skip
SMALL = {
    "hidden": 64, "layers": 2, "state": 32, "context": 64, "shortest": 1, "longest": 8, "steps": 1500,
    "batch": 32, "learning_rate": 5e-3, "lengths": [4, 8, 12, 16, 24, 32], "samples": 128,
    "kept": 48_000,
}  # fmt: skip


def build(size: dict, seed: int) -> Mamba2ForCausalLM:
    """A fresh model over the 30 tokens of the task."""
    torch.manual_seed(seed)
    config = Mamba2Config(
        vocab_size=len(VOCABULARY),
        hidden_size=size["hidden"],
        num_hidden_layers=size["layers"],
        state_size=size["state"],
        head_dim=32,
        num_heads=2 * size["hidden"] // 32,
        n_groups=1,
        chunk_size=64,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = Mamba2ForCausalLM(config)
    if size.get("slow"):
        for name, rates in model.named_parameters():
            if name.endswith("A_log"):
                rates.data.uniform_(0.001, 0.1).log_()
    return model


def run(size: dict, intervention: str, seed: int, options: argparse.Namespace) -> dict:
    """Train and score one model; its results."""
    began = time.perf_counter()
    words = copying_tokenizer()
    task = Copying(HFTokenizer(words, "copying"))
    lm = RecurrentLM(build(size, seed).to(options.device), name=f"copying-{intervention}-{seed}")
    strings = {name: size[name] for name in ("context", "shortest", "longest")}
    rows = CopyRows(task, timed.MANY * size["batch"], seed=seed, **strings)
    stored = timed.StoredRows(rows, size["kept"], lanes=size["batch"])
    chosen = (
        StatePassing(zero_probability=options.zero_probability, seed=seed) if intervention == "sp" else None
    )
    folder = options.output / f"{intervention}-{seed}"
    steps = options.steps or size["steps"]
    told = timed.train(
        lm,
        stored,
        chosen,
        folder,
        seconds=options.seconds,
        steps=steps,
        length=size["context"],
        batch_size=size["batch"],
        learning_rate=size["learning_rate"],
        schedule="linear",
        warmup=min(0.5, 100 / steps),
        weight_decay=0.1,
        seed=seed,
    )
    words.save_pretrained(folder)
    row = Row(None, task)
    cells = evaluate_grid(
        lm, [row], size["lengths"], samples=size["samples"], batch_size=size["samples"], seed=seed + 1000
    )
    result = task_result(
        lm,
        cells,
        [row],
        size["lengths"],
        label=intervention,
        train_length=size["longest"],
        settings=size | {"training": told, "zero_probability": options.zero_probability},
        seed=seed,
        seconds=time.perf_counter() - began,
    ).to_json()
    write_json(folder.with_suffix(".json"), result)
    return result


def summarise(results: list[dict]) -> dict:
    """Mean and standard deviation over seeds of each score at each length."""
    summary: dict = {"kind": "copying", "seeds": len(results), "scores": {}}
    for name, table in results[0]["tasks"].items():
        by_seed = [[values[0] for values in result["tasks"][name]["accuracy"]] for result in results]
        columns = list(zip(*by_seed, strict=True))
        summary["scores"][name] = {
            "lengths": table["lengths"],
            "mean": [statistics.mean(column) for column in columns],
            "std": [statistics.stdev(column) if len(column) > 1 else None for column in columns],
        }
    return summary


def main() -> None:
    """Train, score, summarise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a size for one CPU core")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--interventions", nargs="+", choices=["none", "sp"], default=["none", "sp"])
    parser.add_argument("--zero-probability", type=float, default=0.1, help="State Passing's")
    parser.add_argument("--longest", type=int, help="letters of a string in training, at most")
    parser.add_argument("--context", type=int, help="tokens of a row in training")
    parser.add_argument("--slow", action="store_true", help="no head forgets at first")
    parser.add_argument("--steps", type=int, help="other than the size's own")
    parser.add_argument("--seconds", type=float, help="of training and what goes before it, one run a script")
    parser.add_argument("--summary", action="store_true", help="only summarise the results in OUTPUT")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("copying"))
    options = parser.parse_args()
    size = dict(SMALL if options.small else LARGE)
    if options.longest:
        size["longest"] = options.longest
        size["lengths"] = [options.longest * times // 2 for times in (1, 2, 3, 4, 6, 7, 8)]
    size |= {"context": options.context or size["context"], "slow": options.slow}
    summary = {}
    for intervention in options.interventions:
        files = [options.output / f"{intervention}-{seed}.json" for seed in options.seeds]
        if options.summary:
            results = [read_json(file) for file in files if file.exists()]
        else:
            results = [run(size, intervention, seed, options) for seed in options.seeds]
        summary[intervention] = summarise(results)
        for name, score in summary[intervention]["scores"].items():
            means = ", ".join(f"{n}: {m:.2f}" for n, m in zip(score["lengths"], score["mean"], strict=True))
            print(f"{intervention} {name}: {means}", flush=True)
    if options.summary or options.seconds is None:
        write_json(options.output / "summary.json", summary)


if __name__ == "__main__":
    main()
