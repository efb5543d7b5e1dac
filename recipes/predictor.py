"""Forecast where the loss will rise from what is seen inside T only, on models of which at least half break.

    python recipes/predictor.py --workers 14 --output predictor                 # on a GPU
    python recipes/predictor.py --analyse predictor/models.json --output predictor

Families x training length x initialisation x tokens: each model is trained at T from the zero state, the real
edge is that of `diagnose` on texts of 64 T (models that hold are censored there), and the measures read texts
of T tokens only:

- `superposed`: `longroll.measure.forecast`, the edge in octaves of T: the state after n T tokens is put
  together from those of texts of T tokens, and short texts are read from it. Nothing is fitted;
- `horizon`: how much of a foreign initial state is left after T tokens, as the number of T over which it
  decays by e, in log2; the mean over heads and the largest;
- `growth`: log2 of the norm of the states at T over that at T / 2; mean and largest;
- `drift`: energy distance (`coverage`) between the states of (T/4, T/2] and of (T/2, T]; mean and largest;
- `rank`: effective rank of the states at T over that at T / 2, in log2, mean;
- `slope`: loss over (3/4 T, T] less that over (T/2, 3/4 T], nats.

After the first pass, combinations whose model broke are made again with other seeds until half of all models
break. `fitted` is a ridge regression of log2(edge / T) on the standardised measures but `superposed`, fitted
on all families but the one it is tried on. Concordance is Harrell's C (1982) with censored models: the share
of pairs, one of which is known to break first, whose order is told; beside it, each measure alone, with
bootstrap intervals over models.
"""

import timed  # isort: skip  (its clock starts first)

import argparse
import math
import multiprocessing
import time
from itertools import product
from pathlib import Path
from typing import Any

import hybrids
import numpy as np
import torch
from blame import read_bytes
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from longroll import RecurrentLM, diagnose
from longroll.data import long_sequences
from longroll.errors import first_line
from longroll.families.fla_models.gated_deltanet import GatedDeltaNetConfig, GatedDeltaNetForCausalLM
from longroll.families.fla_models.gla import GLAConfig, GLAForCausalLM
from longroll.families.fla_models.rwkv6 import RWKV6Config, RWKV6ForCausalLM
from longroll.heads import head_norms, heads_of
from longroll.measure import coverage, forecast, position_loss
from longroll.results import provenance, read_json, write_json
from longroll.state import RecurrentState

TIMES = 64
MEASURES = (
    "superposed", "horizon_mean", "horizon_max", "growth_mean", "growth_max", "drift_mean", "drift_max",
    "rank", "slope",
)  # fmt: skip
SLOW = (0.001, 0.05)
FAMILIES = ("mamba2", "mamba", "gla", "rwkv6", "falcon_mamba", "gated_deltanet")
_TOKENS = {"vocab_size": 256, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def build(family: str, slow: float, seed: int, size: int) -> Any:
    """A fresh model, a share `slow` of whose heads (channels) can hardly forget and is not trained to."""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    common = _TOKENS | {"hidden_size": size, "num_hidden_layers": 2, "tie_word_embeddings": True}
    if family == "mamba2":
        model: Any = Mamba2ForCausalLM(
            Mamba2Config(
                **common, state_size=64, head_dim=32, num_heads=2 * size // 32, n_groups=1, chunk_size=64
            )
        )
    elif family == "mamba":
        model = MambaForCausalLM(MambaConfig(**common, state_size=16))
    elif family == "gla":
        model = GLAForCausalLM(GLAConfig(**common, num_heads=2, expand_k=0.5, hidden_ratio=2))
    elif family == "falcon_mamba":
        model = FalconMambaForCausalLM(FalconMambaConfig(**common, state_size=16))
    elif family == "rwkv6":
        model = RWKV6ForCausalLM(
            RWKV6Config(**common, num_heads=2, proj_low_rank_dim=16, gate_low_rank_dim=16)
        )
    else:
        model = GatedDeltaNetForCausalLM(
            GatedDeltaNetConfig(**common, num_heads=2, head_dim=32, hidden_ratio=2)
        )
    for name, module in model.named_modules():
        if slow and name.endswith("gk_proj"):  # GLA's decays
            channels = round(slow * module[1].weight.shape[0])
            module[1].weight.data[:channels] = 0
            module[1].bias.data[:channels] = 6.0  # log sigmoid(6) / 16 = -.00015
            module[1].requires_grad_(False)
        if slow and name.endswith("w_proj.linear.lora"):  # RWKV-6's
            channels = round(slow * module[-1].weight.shape[0])
            module[-1].weight.data[:channels] = 0
            module[-1].bias.data[:channels] = -9.0  # exp(-9) = .0001
            module[-1].requires_grad_(False)
    for name, weight in model.named_parameters():
        if slow and name.endswith("A_log"):
            some = round(slow * len(weight))
            rates = torch.tensor(random.uniform(*SLOW, size=(some, *weight.shape[1:])))
            weight.data[:some] = rates.log().to(weight)
            weight.requires_grad_(False)
    return model


@torch.no_grad()
def inside(lm: RecurrentLM, tokens: torch.Tensor, length: int) -> dict[str, Any]:
    """The measures, of texts (B, T + 1)."""
    half, ids = length // 2, tokens.to(lm.device)
    _, at_half = lm(ids[:, :half], logits=False)
    _, at_end = lm(ids[:, half:length], at_half, logits=False)
    other = at_end.part("recurrent", "conv").rows([*range(1, len(ids)), 0])
    _, from_other = lm(ids[:, :length], other, logits=False)
    horizons, growths, ranks = [], [], []
    for key in (key for key in at_end if key.part == "recurrent"):
        left = head_norms(from_other[key] - at_end[key]) / head_norms(other[key]).clamp_min(1e-20)
        share = left.double().clamp(1e-30, 1 - 1e-6).log().mean(dim=0)  # log of what is left, a head
        horizons.append((-1 / share).log2())
        growths.append(
            (head_norms(at_end[key]) / head_norms(at_half[key]).clamp_min(1e-20)).log2().mean(dim=0)
        )
        ranks.append(_rank(at_end).log2().mean() - _rank(at_half).log2().mean() if key.slot == 0 else None)
    horizon, growth = torch.cat(horizons).double().cpu(), torch.cat(growths).double().cpu()
    quarters = [max(half + 1, half * i // 8 + half) for i in (2, 4, 6, 8)]
    told = forecast(lm, tokens, length, times=TIMES)
    # what is forecast to hold: later than all, and the later the less its loss has risen
    octaves = told.octaves if told.octaves is not None else math.log2(TIMES) + 1 - min(1.0, told.mean[-1])
    found = coverage(lm, tokens[:, :length], half, sorted(set(quarters)))
    energy = torch.cat([layer.energy for layer in found.layers])
    losses = position_loss(lm, tokens)
    values = [
        -octaves, horizon.mean(), horizon.max(), growth.mean(), growth.max(), energy.mean(), energy.max(),
        torch.stack([rank for rank in ranks if rank is not None]).mean(),
        losses.between(3 * length // 4, length) - losses.between(half, 3 * length // 4),
    ]  # fmt: skip
    measures = {name: float(value) for name, value in zip(MEASURES, values, strict=True)}
    return {"measures": measures, "forecast": told.to_json()}


def _rank(state: RecurrentState) -> torch.Tensor:
    """Effective rank of every head's matrix: exp of the entropy of its normalised singular values."""
    ranks = []
    for tensor in state.part("recurrent").values():
        values = torch.linalg.svdvals(heads_of(tensor).double().flatten(0, 1).cpu())
        shares = values / values.sum(dim=-1, keepdim=True).clamp_min(1e-30)
        ranks.append(torch.special.entr(shares).sum(dim=-1).exp())
    return torch.cat(ranks)


def make(job: tuple[str, int, float, int, int]) -> dict[str, Any] | None:
    """Make a model; None, with the reason printed, where a shared GPU has no room for it."""
    try:
        return try_one(job)
    except RuntimeError as error:
        print(*job, first_line(error), flush=True)
        return None


def try_one(job: tuple[str, int, float, int, int]) -> dict[str, Any]:
    """Train a model, measure it inside T, find its edge."""
    family, length, slow, steps, seed = job
    options, began = _options, time.perf_counter()
    ids, valid = _data
    model = build(family, slow, seed, options.size)
    model.config.train_length = length
    lm = RecurrentLM(model.to(options.device), name=family)
    told = hybrids.train(
        lm, ids, (), length=length, pieces=1, steps=steps, batch=options.batch, learning_rate=3e-3,
        seed=seed,
    )  # fmt: skip
    short = long_sequences(valid, length, 4 * options.texts, seed=1)
    measures = inside(lm, short, length)
    found = diagnose(lm, long_sequences(valid, options.times * length, options.texts, seed=0), explain=False)
    result = {
        "family": family, "train_length": length, "slow": slow, "steps": steps, "seed": seed,
        "training": told, **measures, "edge": found.edge, "verdict": found.verdict,
        "severity": found.severity, "levels": found.levels, "excess": found.details["excess"],
        "seconds": time.perf_counter() - began,
    }  # fmt: skip
    print(
        *job, found.verdict, found.edge, {n: round(v, 2) for n, v in measures["measures"].items()}, flush=True
    )
    return result


def concordance(risk: np.ndarray, edge: np.ndarray, broke: np.ndarray) -> float:
    """Harrell's C: of pairs one of which is known to break first, the share in which its risk is higher."""
    first = broke[:, None] & ((edge[:, None] < edge) | ((edge[:, None] == edge) & ~broke))
    order = (risk[:, None] > risk) + 0.5 * (risk[:, None] == risk)
    return float((order * first).sum() / max(1, first.sum()))


def forecast_by(rows: np.ndarray, target: np.ndarray, new: np.ndarray, ridge: float = 1.0) -> np.ndarray:
    """Ridge regression on standardised columns: the target of `new` rows."""
    mean, std = rows.mean(axis=0), rows.std(axis=0) + 1e-9
    x = (rows - mean) / std
    weights = np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ (target - target.mean()))
    return target.mean() + (new - mean) / std @ weights


def analyse(models: list[dict[str, Any]], times: int) -> dict[str, Any]:
    """Concordance of the fit on families held out, and of each measure alone, with intervals."""
    x = np.array([[model["measures"][name] for name in MEASURES] for model in models])
    x = np.nan_to_num(x, nan=0.0, posinf=60.0, neginf=-60.0)
    broke = np.array([model["edge"] is not None for model in models])
    edge = np.array([math.log2((m["edge"] or times * m["train_length"]) / m["train_length"]) for m in models])
    families = np.array([model["family"] for model in models])
    fitted = np.empty(len(models))
    for family in np.unique(families):
        out = families == family
        # one octave later for who holds
        fitted[out] = forecast_by(x[~out, 1:], edge[~out] + ~broke[~out], x[out, 1:])
    random = np.random.default_rng(0)
    draws = [random.integers(len(models), size=len(models)) for _ in range(1000)]

    def with_interval(risk: np.ndarray) -> list[float]:
        drawn = [concordance(risk[i], edge[i], broke[i]) for i in draws]
        return [concordance(risk, edge, broke), *np.quantile(drawn, [0.025, 0.975]).tolist()]

    def by_family(risk: np.ndarray) -> dict[str, float | None]:
        """None where no pair of a family has an order."""
        own = {f: families == f for f in np.unique(families).tolist()}
        return {
            f: concordance(risk[i], edge[i], broke[i]) if broke[i].any() else None for f, i in own.items()
        }

    alone = {}
    for i, name in enumerate(MEASURES):
        sign = 1 if name == "superposed" or concordance(x[:, i], edge, broke) >= 0.5 else -1
        alone[name] = {"sign": sign, "concordance": with_interval(sign * x[:, i])}
    said = -x[:, 0] <= math.log2(times)  # to break within the texts
    return {
        "models": len(models), "broke": int(broke.sum()),
        "by_family_broke": {f: [int(broke[families == f].sum()), int((families == f).sum())]
                            for f in np.unique(families).tolist()},
        "held_out": with_interval(-fitted), "alone": alone,
        "superposed": {
            "breaks_called": [int((said & broke).sum()), int(broke.sum())],
            "holds_called": [int((~said & ~broke).sum()), int((~broke).sum())],
            "octaves_off": np.quantile((-x[:, 0] - edge)[said & broke], [0.25, 0.5, 0.75]).tolist()
            if (said & broke).any() else None,
            "by_family": by_family(x[:, 0]),
        },
        "by_family": by_family(-fitted),
    }  # fmt: skip


def cell_of(model: dict[str, Any]) -> tuple[str, int, float, int]:
    """Family, training length, share of slow heads and steps of a model that was made."""
    return model["family"], model["train_length"], model["slow"], model["steps"]


def _begin(options: argparse.Namespace) -> None:
    global _options, _data
    torch.set_num_threads(1)
    _options, _data = options, read_bytes(options.text, options.validation)


def main() -> None:
    """Make the models, several at a time, and analyse those there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--text", default="stdlib")
    parser.add_argument("--validation", help="other texts; default: some of --text")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES))
    parser.add_argument("--size", type=int, default=128, help="d_model")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--slow", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--steps", type=int, nargs="+", default=[400, 2000])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--times", type=int, default=TIMES)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--passes", type=int, default=4, help="over the combinations, at most")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--analyse", type=Path, help="models that were made before")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.analyse:
        made = read_json(options.analyse)
        made["analysis"] = analyse(made["models"], made["settings"]["times"])
        write_json(options.output / "models.json", made)
        print(made["analysis"])
        return
    # long trainings first, so that none is alone at the end
    cells = sorted(
        product(options.families, options.lengths, options.slow, options.steps), key=lambda j: -j[3]
    )
    models: list[dict[str, Any]] = []
    lm = RecurrentLM(build("mamba2", 0.0, 0, 32).to(options.device), name="several")
    result: dict[str, Any] = {}
    with multiprocessing.get_context("spawn").Pool(options.workers, _begin, (options,)) as pool:
        for again in range(options.passes):
            broken = {cell_of(model) for model in models if model["edge"] is not None}
            if again and 2 * sum(model["edge"] is not None for model in models) >= len(models):
                break
            jobs = [(*cell, options.seed + again) for cell in cells if not again or cell in broken]
            for model in pool.imap_unordered(make, jobs):
                models += [model] if model else []
                settings = {n: v for n, v in vars(options).items() if n not in ("output", "analyse")}
                result = {
                    "settings": settings, "models": models,
                    "provenance": provenance(lm, seed=options.seed, seconds=time.time() - timed.BEGAN),
                }  # fmt: skip
                if len({model["family"] for model in models}) > 1:
                    result["analysis"] = analyse(models, options.times)
                write_json(options.output / "models.json", result)
    print(result.get("analysis"))


if __name__ == "__main__":
    main()
