"""State tracking with and without interventions: word problems of groups, trained short, read long.

    python recipes/tracking.py --workers 14 --output tracking

For each family, group and seed a model (`base`) is trained from scratch on words of T - 1 elements
(`longroll.tasks.TrackingRows`) from the zero state, until it tells 99 % of the products in range or the steps
are over. Its weights are then trained on by four initial states with equal tokens: `none`; `sp`, where nine
in ten rows begin from the final state of another row and have to reset at the start token; `fitted`, where
these begin from noise; `tbptt`, where a word goes on over PIECES rows. All are told apart at T to 64 T by
`tagged` and `free` accuracy. Guessing is right once in as many times as the group has elements: parity .5, Z3
.33, S3 .17, S5 .008. OUTPUT/tracking.json: every run, and means and standard deviations over seeds.
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
from steps import fit
from transformers import Mamba2Config, Mamba2ForCausalLM

from longroll import TBPTT, FittedNoise, RecurrentLM, StatePassing
from longroll.data import HFTokenizer
from longroll.data.lanes import IGNORED
from longroll.families.fla_models.delta_net import DeltaNetConfig, DeltaNetForCausalLM
from longroll.families.fla_models.gla import GLAConfig, GLAForCausalLM
from longroll.families.fla_models.rwkv7 import RWKV7Config, RWKV7ForCausalLM
from longroll.results import provenance, read_json, write_json
from longroll.tasks import Row, StateTracking, evaluate_grid, tracking_tokenizer
from longroll.tasks.state_tracking import ASKED, drawn_elements

GROUPS = ("parity", "z3", "s3", "s5-swaps")
WAYS = {
    "none": lambda seed: None,
    "sp": lambda seed: StatePassing(zero_probability=0.1, seed=seed),
    "fitted": lambda seed: FittedNoise(zero_probability=0.1, seed=seed),
    "tbptt": lambda seed: TBPTT(seed=seed),
}
"""A tenth of the rows start from zero, as the default recipe has it; pieces of a word cannot."""
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
    """RWKV-7 of two layers: eigenvalues of its transitions are above exp(-exp(-0.5)) - 1 = -0.45."""
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


class Words:
    """Batches of words drawn on the model's device, none twice; called with the number of the step.

    They are distributed as `longroll.tasks.TrackingRows`. A word goes on over `pieces` batches. With a
    `curriculum` of so many steps the share of elements that move at most two points falls from 1 to 0.
    """

    def __init__(
        self, task: StateTracking, length: int, rows: int, *, pieces: int, seed: int, device: torch.device,
        curriculum: int = 0,
    ) -> None:  # fmt: skip
        self.shape, self.length = (rows, length * pieces), length
        self.pieces, self.curriculum = pieces, curriculum
        self.table, self.elements, self.drawn = (
            torch.from_numpy(array).to(device).long() for array in (task.table, task.elements, task.drawn)
        )
        easy = drawn_elements(f"{task.group}-swaps") if curriculum else task.drawn
        self.easy = torch.from_numpy(easy).to(device).long()
        self.start, self.ask = task.start, task.ask_id
        self.random = torch.Generator(device).manual_seed(seed)
        self.device = device

    def __call__(self, step: int) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `shift_labels` (B, T) and `starts` (B,)."""
        piece = step % self.pieces
        if piece == 0:
            self.word = self._draw(1 - step / self.curriculum if step < self.curriculum else 0.0)
        part = slice(piece * self.length, (piece + 1) * self.length)
        starts = torch.full(self.shape[:1], piece == 0, device=self.device)
        ids, labels = (tensor[:, part].contiguous() for tensor in self.word)
        return {"input_ids": ids, "shift_labels": labels, "starts": starts}

    def _draw(self, easy: float) -> tuple[torch.Tensor, torch.Tensor]:
        drawn = self._any_of(self.drawn)
        if easy:
            drawn = torch.where(self._chance() < easy, self._any_of(self.easy), drawn)
        asked = self._chance() < ASKED
        asked[:, 0] = True  # the start token: no element, and no product to learn
        products = products_of(self.table, drawn.masked_fill(asked, 0))
        ids = torch.where(asked, self.ask, self.elements[drawn])
        labels = self.elements[products]
        ids[:, 0], labels[:, 0] = self.start, IGNORED
        return ids, labels

    def _any_of(self, elements: torch.Tensor) -> torch.Tensor:
        places = torch.randint(len(elements), self.shape, generator=self.random, device=self.device)
        return elements[places]

    def _chance(self) -> torch.Tensor:
        return torch.rand(self.shape, generator=self.random, device=self.device)


def products_of(table: torch.Tensor, elements: torch.Tensor) -> torch.Tensor:
    """Return the product of the first t elements, for every t, (B, T), in log2 T steps."""
    products, ahead = elements, 1
    while ahead < elements.shape[1]:
        joined = table[products[:, :-ahead], products[:, ahead:]]
        products = torch.cat([products[:, :ahead], joined], dim=1)
        ahead *= 2
    return products


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
        curriculum = options.curriculum * steps if way == "base" and group in ("s3", "s4", "s5") else 0
        words = Words(
            task, options.length, options.batch, pieces=pieces, seed=seed if way == "base" else seed + 1000,
            device=lm.device, curriculum=round(curriculum),
        )  # fmt: skip
        told = fit(
            lm, words, WAYS.get(way, WAYS["none"])(seed), steps=steps,
            learning_rate=options.learning_rate if way == "base" else options.learning_rate / 4,
            learned=LEARNED if way == "base" else 0.0, warm=round(curriculum),
            cuda_graphs=options.cuda_graphs,
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
    parser.add_argument(
        "--curriculum", type=float, default=0.0, help="share of the steps of sN that begin with swaps"
    )
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--times", type=int, default=64, help="longest word, in training lengths")
    parser.add_argument("--no-graphs", dest="cuda_graphs", action="store_false", help="eager steps")
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
