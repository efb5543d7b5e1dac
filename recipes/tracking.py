"""State tracking with and without interventions: word problems of groups, trained short, read long.

    python recipes/tracking.py --workers 14 --output tracking

For each family, group and seed a model (`base`) is trained from scratch on words of T - 1 elements
(`longroll.tasks.TrackingRows`) from the zero state, until it tells 99 % of the products in range or the steps
are over. Its weights are then trained on by three initial states with equal tokens: `none`; `sp`, where every
row begins from the final state of another row and has to reset at the start token; `tbptt`, where a word
goes on over PIECES rows. All are told apart at T to 64 T by `tagged` and `free` accuracy. Guessing is right
once in as many times as the group has elements: parity .5, Z3 .33, S3 .17, S5 .008. OUTPUT/tracking.json:
every run, and means and standard deviations over seeds.
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
from torch.utils.data import Dataset
from transformers import Mamba2Config, Mamba2ForCausalLM, TrainerCallback

from longroll import TBPTT, RecurrentLM, StatePassing
from longroll.data import HFTokenizer
from longroll.families.fla_models.delta_net import DeltaNetConfig, DeltaNetForCausalLM
from longroll.families.fla_models.gla import GLAConfig, GLAForCausalLM
from longroll.families.fla_models.rwkv7 import RWKV7Config, RWKV7ForCausalLM
from longroll.results import provenance, read_json, write_json
from longroll.tasks import Row, StateTracking, TrackingRows, evaluate_grid, tracking_tokenizer

GROUPS = ("parity", "z3", "s3", "s5-swaps")
WAYS = {"none": None, "sp": StatePassing, "tbptt": TBPTT}
PIECES = 8
"""Rows of a word of TBPTT."""
LEARNED = 0.03
"""Nats a product: training of a base ends below."""
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


def delta_net(vocabulary: int, size: int) -> Any:
    """DeltaNet of two layers with eigenvalues from -1 to 1 (Grazzi et al. 2024, arXiv 2411.12537)."""
    return DeltaNetForCausalLM(
        DeltaNetConfig(
            vocab_size=vocabulary, hidden_size=size, num_hidden_layers=2, num_heads=size // 32,
            hidden_ratio=2, allow_neg_eigval=True, **_TOKENS,
        )
    )  # fmt: skip


def gla(vocabulary: int, size: int) -> Any:
    """GLA of two layers: its decays are positive, as Mamba-2's are."""
    return GLAForCausalLM(
        GLAConfig(
            vocab_size=vocabulary, hidden_size=size, num_hidden_layers=2, num_heads=size // 32,
            hidden_ratio=2, **_TOKENS,
        )
    )  # fmt: skip


FAMILIES = {"rwkv7": rwkv7, "mamba2": mamba2, "delta_net": delta_net, "gla": gla}


class LongWords(Dataset):
    """Rows of `length` tokens, `pieces` of which are one word; item k * lanes + l is step k of lane l."""

    def __init__(
        self, task: StateTracking, length: int, rows: int, *, lanes: int, pieces: int, seed: int
    ) -> None:
        self.words = TrackingRows([task], length * pieces, rows, seed=seed)
        self.length, self.lanes, self.pieces = length, lanes, pieces

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        step, lane = divmod(index, self.lanes)
        word, piece = divmod(step, self.pieces)
        row = self.words[word * self.lanes + lane]
        part = slice(piece * self.length, (piece + 1) * self.length)
        names = ("input_ids", "shift_labels")
        return {name: row[name][part] for name in names} | {"starts": torch.tensor(piece == 0)}


class Learned(TrainerCallback):
    """Ends training where the loss says that the task is learned in range."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Stop below the loss of a model that is right in 99 of 100."""
        if (logs or {}).get("loss", 1.0) < LEARNED:
            control.should_training_stop = True


def try_one(job: tuple[int, str, str]) -> list[dict[str, Any]]:
    """Train a base, train it on in every way, and measure all."""
    seed, family, group = job
    options = _options
    tokenizer = HFTokenizer(tracking_tokenizer(), "tracking")
    task = StateTracking(tokenizer, group)
    torch.manual_seed(seed)
    model = FAMILIES[family](tokenizer.vocab_size, options.size)
    model.config.train_length = options.length
    lm = RecurrentLM(model.to(options.device), name=family)
    results: list[dict[str, Any]] = []
    base: dict[str, torch.Tensor] = {}
    for way in ("base", *WAYS):
        began = time.perf_counter()
        steps = options.steps if way == "base" else options.more
        if way != "base":
            model.load_state_dict(base)
        pieces = PIECES if way == "tbptt" else 1
        rows = LongWords(
            task, options.length, steps * options.batch, lanes=options.batch, pieces=pieces,
            seed=seed if way == "base" else seed + 1000,
        )  # fmt: skip
        whole = options.batch * pieces  # a word is stored whole
        kept = max(whole, min(options.kept, len(rows)) // whole * whole)
        stored = timed.StoredRows(rows, kept, lanes=options.batch)
        chosen = WAYS.get(way)
        told = timed.train(
            lm, stored, chosen and chosen(seed=seed),
            options.output / "-".join(map(str, (*job, way))), seconds=None, steps=steps,
            length=options.length, batch_size=options.batch, seed=seed, bf16=False,
            cuda_graphs=options.cuda_graphs,
            callbacks=[Learned()] if way == "base" else [],
            learning_rate=options.learning_rate if way == "base" else options.learning_rate / 4,
        )  # fmt: skip
        lengths = [times * options.length - 2 for times in (1, 2, 4, 16, 64) if times <= options.times]
        cells = evaluate_grid(
            lm.eval(), [Row(group, task)], lengths, samples=options.samples, batch_size=options.samples
        )
        accuracy = [
            [cell["length"], *(cell["scores"][name]["mean"] for name in ("tagged", "free"))] for cell in cells
        ]
        seconds = time.perf_counter() - began
        print(*job, way, told["steps"], accuracy, f"{seconds:.0f} s", flush=True)
        results.append(
            {
                "family": family, "group": group, "intervention": way, "seed": seed, "accuracy": accuracy,
                "training": told, "seconds": seconds,
            }
        )  # fmt: skip
        if way == "base":
            base = {name: weight.clone() for name, weight in model.state_dict().items()}
    return results


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


def _job(job: tuple[int, str, str]) -> list[dict[str, Any]] | None:
    return timed.attempt(try_one, job)


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
    parser.add_argument("--resume", type=Path, help="an earlier tracking.json, whose runs are kept")
    parser.add_argument("--size", type=int, default=128, help="d_model")
    parser.add_argument("--length", type=int, default=64, help="T")
    parser.add_argument("--steps", type=int, default=5000, help="of training a base, at most")
    parser.add_argument("--more", type=int, default=1000, help="steps of training it on")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--kept", type=int, default=60_000, help="rows made beforehand")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--times", type=int, default=64, help="longest word, in training lengths")
    parser.add_argument("--cuda-graphs", action="store_true", default=None, help="of every family")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    before = read_json(options.resume) if options.resume else {"runs": []}
    runs: list[dict[str, Any]] = before["runs"]
    earlier = [*before.get("earlier", []), before["provenance"]] if runs else []
    done = {(run["seed"], run["family"], run["group"]) for run in runs}
    jobs = [job for job in product(range(options.seeds), options.families, options.groups) if job not in done]
    lm = RecurrentLM(mamba2(128, 32).to(options.device), name="several")
    with multiprocessing.get_context("spawn").Pool(options.workers, _begin, (options,)) as pool:
        for run in filter(None, pool.imap_unordered(_job, jobs)):
            runs += run
            settings = {
                name: value for name, value in vars(options).items() if name not in ("output", "resume")
            }
            made = provenance(lm, seed=0, seconds=time.time() - timed.BEGAN)
            whole = {"settings": settings, "summary": summary(runs), "runs": runs, "provenance": made}
            whole |= {"earlier": earlier} if earlier else {}
            write_json(options.output / "tracking.json", whole)


if __name__ == "__main__":
    main()
