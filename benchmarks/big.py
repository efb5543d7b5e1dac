"""Models of real size on one GPU or two: loss, diagnosis, training, and the steps' kernels.

    python benchmarks/big.py --json big.json                          # every row that fits the GPUs here
    python benchmarks/big.py --only loss ssd step --json big.json
    python benchmarks/big.py --tiny --device cpu                      # checks the script on tiny models

Weights are random, drawn on the GPU in the shape of released models; tokens are random. bfloat16. The file is
written again after every row. Seconds are medians of `seconds`; peaks are what PyTorch allocated at most, the
weights included. MFU counts 6 flops a trained parameter and token, 4 where only adapters are trained, and
those parameters of experts that a token meets; no recurrence and no attention.

`diagnose` reads a model whose decays are slow and whose head turns what drifts into loss, so that it breaks
and its causes are looked for.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import math
import pstats
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PrinterCallback, TrainerCallback

import longroll
from longroll.conformance.tiny import CONFIGS
from longroll.families.int8 import to_int8
from longroll.measure.roll_out import default_chunk, roll_out
from longroll.ops import _backend
from longroll.results import BenchmarkResult, provenance
from longroll.training import PosttrainOptions
from longroll.training.graphs import StepGraph
from longroll.training.lora import with_lora
from longroll.training.options import trainer_arguments
from longroll.training.trainer import InitialStateTrainer

PEAK = {"NVIDIA H200": 990e12, "NVIDIA H100 80GB HBM3": 990e12}  # dense bf16, from the data sheets

_NEMOTRON = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
_BLOCKS = {"M": "linear_attention", "-": "mlp", "*": "full_attention"}
_MAMBA2 = {"state_size": 128, "head_dim": 64, "n_groups": 1, "expand": 2, "vocab_size": 50288}
_BAMBA = {"vocab_size": 128256, "mamba_d_head": 64, "mamba_d_state": 128, "num_key_value_heads": 8}

SHAPES: dict[str, tuple[str, dict[str, Any], str]] = {
    "bamba-9.8b": (
        "bamba",
        _BAMBA | {"num_hidden_layers": 32, "attn_layer_indices": [9, 18, 27]},
        "bamba",
    ),
    "bamba-1b": (
        "bamba",
        _BAMBA
        | {
            "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "attn_layer_indices": [5, 11], "mamba_n_heads": 64, "vocab_size": 50288,
        },
        "bamba",
    ),
    "bamba-30b": (
        "bamba",
        _BAMBA
        | {
            "hidden_size": 6144, "intermediate_size": 21504, "num_hidden_layers": 46,
            "num_attention_heads": 48,
            "attn_layer_indices": [9, 18, 27, 36], "mamba_n_heads": 192,
        },
        "bamba",
    ),
    "qwen3-next-6b": (
        "qwen3_next",
        {"num_hidden_layers": 24, "num_experts": 64, "head_dim": 256, "vocab_size": 151936},
        "qwen3_next",
    ),
    "nemotron-h-8b": (
        "nemotron_h",
        {"layers_block_type": [_BLOCKS[letter] for letter in _NEMOTRON], "vocab_size": 131072},
        "nemotron_h",
    ),
    "falcon-h1-7b": (
        "falcon_h1",
        {
            "hidden_size": 3072, "intermediate_size": 12288, "num_hidden_layers": 44,
            "num_attention_heads": 12,
            "num_key_value_heads": 2, "head_dim": 128, "mamba_d_ssm": 3072, "mamba_n_heads": 24,
            "mamba_d_head": 128, "mamba_d_state": 256, "vocab_size": 130048,
        },
        "falcon_h1",
    ),
    "mamba2-2.7b": (
        "mamba2",
        _MAMBA2 | {"hidden_size": 2560, "num_hidden_layers": 64, "num_heads": 80},
        "mamba2",
    ),
    "mamba2-370m": (
        "mamba2",
        _MAMBA2 | {"hidden_size": 1024, "num_hidden_layers": 48, "num_heads": 32},
        "mamba2",
    ),
    "mamba-370m": ("mamba", {"hidden_size": 1024, "num_hidden_layers": 48, "vocab_size": 50280}, "mamba"),
}  # fmt: skip
"""Name -> model type, entries of its config, and the tiny model that checks the script."""


@dataclass
class Bench:
    """What every row needs."""

    device: torch.device
    tiny: bool
    repeats: int
    folder: Path
    profiles: Path | None
    models: dict[str, longroll.RecurrentLM] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        """Whether it is a GPU."""
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Of models that are read."""
        return torch.bfloat16 if self.cuda else torch.float32

    def size(self, real: int, tiny: int) -> int:
        """A size of the row, or that of its dry run."""
        return tiny if self.tiny else real

    def model(self, shape: str, dtype: torch.dtype | None = None) -> longroll.RecurrentLM:
        """The model of a shape; one exists at a time."""
        key = f"{shape} {dtype}"
        if key not in self.models:
            self.free()
            torch.manual_seed(0)
            with torch.device(self.device):
                model = AutoModelForCausalLM.from_config(self.config(shape), dtype=dtype or self.dtype)
            self.models[key] = longroll.RecurrentLM(model.eval(), name=shape)
        return self.models[key]

    def config(self, shape: str) -> Any:
        """The config of a shape."""
        model_type, entries, tiny = SHAPES[shape]
        if self.tiny:
            model_type, entries = CONFIGS[tiny]
        return AutoConfig.for_model(model_type, **entries)

    def free(self) -> None:
        """Forget the model that exists."""
        self.models.clear()
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def tokens(self, lm: longroll.RecurrentLM, rows: int, length: int, words: int | None = None) -> Tensor:
        """Random tokens (rows, length + 1), on the CPU as a user's are."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(words or lm.vocab_size, (rows, length + 1), generator=generator)

    def timed(self, call: Callable[[], Any], *, repeats: int | None = None, warm_up: bool = True) -> dict:
        """Seconds of a call, several times, and peaks of each GPU in GiB."""
        if warm_up:
            call()
        self.start()
        seconds = []
        for _ in range(repeats or self.repeats):
            began = time.perf_counter()
            call()
            self.wait()
            seconds.append(time.perf_counter() - began)
        return {"seconds": seconds, "median_seconds": statistics.median(seconds), **self.peaks()}

    def start(self) -> None:
        """Count peaks from here."""
        gc.collect()
        for index in self.gpus():
            torch.cuda.synchronize(index)
            torch.cuda.reset_peak_memory_stats(index)
        if self.cuda:
            torch.cuda.empty_cache()

    def wait(self) -> None:
        """Wait for all GPUs."""
        for index in self.gpus():
            torch.cuda.synchronize(index)

    def peaks(self) -> dict[str, Any]:
        """Peak of allocated and reserved memory, GiB; of several GPUs each."""
        found = [
            (torch.cuda.max_memory_allocated(i) / 2**30, torch.cuda.max_memory_reserved(i) / 2**30)
            for i in self.gpus()
        ]
        if not found:
            return {}
        allocated, reserved = map(list, zip(*found, strict=True))
        one = len(found) == 1
        return {
            "peak_gib": allocated[0] if one else allocated,
            "reserved_gib": reserved[0] if one else reserved,
        }

    def gpus(self) -> range:
        """The indices of the GPUs."""
        return range(torch.cuda.device_count() if self.cuda else 0)


def weights(lm: longroll.RecurrentLM) -> dict[str, Any]:
    """Parameters, those that a token meets, and the memory of all."""
    config = lm.model.config
    share = 1.0
    if experts := getattr(config, "num_experts", None):
        share = config.num_experts_per_tok / experts
    named = {name: p for name, p in lm.model.named_parameters() if "lora_" not in name}
    active = sum(p.numel() * (share if ".experts." in name else 1) for name, p in named.items())
    return {
        "parameters": sum(p.numel() for p in named.values()),
        "active_parameters": round(active),
        "weights_gib": sum(p.numel() * p.element_size() for p in named.values()) / 2**30,
    }


# ---- reading


def loss(
    bench: Bench, shape: str, length: int, repeats: int | None = None, chunk_size: int | None = None
) -> dict[str, Any]:
    """The loss at every position of one text."""
    lm = bench.model(shape)
    length = bench.size(length, 512)
    tokens = bench.tokens(lm, 1, length)
    longroll.position_loss(lm, tokens[:, : length // 8 + 1], chunk_size=chunk_size)  # compiles
    held: list[int] = []

    def watch(read: int, state: longroll.RecurrentState) -> None:
        if read == length:
            held[:] = [_held(state)]

    call = partial(longroll.position_loss, lm, tokens, watch=watch, chunk_size=chunk_size)
    found = bench.timed(call, repeats=repeats, warm_up=False)
    found["keys_and_values_held_gib"] = held[0] / 2**30
    found |= {"tokens_per_second": length / found["median_seconds"], "length": length, **weights(lm)}
    found["chunk_size"] = chunk_size or default_chunk(lm, 1, length)
    flops = 2 * found["active_parameters"] * found["tokens_per_second"]
    return found | {"mfu": _mfu(flops)} | _state_bytes(lm, tokens, length)


def _held(state: longroll.RecurrentState) -> int:
    """Bytes of memory that the keys and values of a state lie in."""
    blocks = [state.blocks(key) for key in state if key.part == "attention"]
    pieces = [piece.untyped_storage() for each in blocks if each is not None for piece in each.pieces]
    return sum({piece.data_ptr(): piece.nbytes() for piece in pieces}.values())


@torch.no_grad()
def _state_bytes(lm: longroll.RecurrentLM, tokens: Tensor, length: int) -> dict[str, Any]:
    """What keys and values of `length` tokens need, GiB, from what those of a few take."""
    few = min(64, length)
    _, state = lm(tokens[:, :few].to(lm.device), logits=False)
    kept = sum(t.numel() * t.element_size() for key, t in state.items() if key.part == "attention")
    return {"keys_and_values_gib": kept / few * length / 2**30}


def diagnose(bench: Bench, explain: bool) -> dict[str, Any]:
    """`longroll.diagnose`, beside the loss of the same texts."""
    rows, length, trained = 4, bench.size(16_384, 512), bench.size(2048, 64)
    if "broken" not in bench.models:
        lm = bench.model("bamba-9.8b")
        _break(lm, bench.tokens(lm, rows, length, words=16), trained)
        bench.models = {"broken": lm}
    lm = bench.models["broken"]
    tokens = bench.tokens(lm, rows, length, words=16)
    longroll.diagnose(lm, tokens[:, : 2 * trained + 1], train_length=trained, explain=explain)  # compiles
    read = bench.timed(partial(longroll.position_loss, lm, tokens), repeats=1)
    stages: list[tuple[float, str]] = []

    def progress(stage: str, *_: Any) -> None:
        if not stages or stages[-1][1] != stage:
            stages.append((time.perf_counter(), stage))

    bench.start()
    began = time.perf_counter()
    found = longroll.diagnose(lm, tokens, train_length=trained, explain=explain, progress=progress)
    bench.wait()
    ended = time.perf_counter()
    times = [*(at for at, _ in stages), ended]
    peaks = bench.peaks()
    if bench.profiles is not None and not explain:
        bench.profiles.mkdir(parents=True, exist_ok=True)
        with cProfile.Profile() as python:
            longroll.diagnose(lm, tokens, train_length=trained, explain=explain)
        with (bench.profiles / "python_diagnose.txt").open("w") as file:
            pstats.Stats(python, stream=file).sort_stats("tottime").print_stats(60)
            pstats.Stats(python, stream=file).sort_stats("cumtime").print_stats(120)
    return {
        "median_seconds": ended - began,
        "times_the_loss": (ended - began) / read["median_seconds"],
        "loss": read,
        "stages": {name: times[i + 1] - at for i, (at, name) in enumerate(stages)},
        "verdict": found.verdict,
        "sentence": found.sentence,
        "advice": found.advice,
        **peaks,
        **({"times_the_peak": peaks["peak_gib"] / read["peak_gib"]} if peaks else {}),
    }


@torch.no_grad()
def _break(lm: longroll.RecurrentLM, tokens: Tensor, trained: int) -> None:
    """Make a Mamba-2 hybrid break on `tokens` (B, L + 1), which are of few words.

    Its states sum up what they read and forget nothing, until at four times the training length they outweigh
    the tokens themselves in every mixer.
    """
    for mixer in lm.model.modules():
        if not hasattr(mixer, "A_log"):
            continue
        shared = 2 * mixer.n_groups * mixer.ssm_state_size  # channels of B and C
        mixer.conv1d.weight.fill_(0.5)
        mixer.conv1d.weight[-shared:] = 0
        mixer.conv1d.bias.fill_(0)
        mixer.conv1d.bias[-shared:] = 0.2
        product = mixer.ssm_state_size * torch.nn.functional.silu(torch.tensor(0.2)).item() ** 2
        mixer.dt_bias.fill_(math.log(math.expm1(1 / (4 * trained * product))))
        mixer.A_log.fill_(-9)
    means = [
        chunk.hidden.float().mean(dim=(0, 1)) for chunk in roll_out(lm, tokens[:1, :-1], chunk_size=trained)
    ]
    drift = means[-1] - means[0]
    head = lm.model.get_output_embeddings().weight
    words = tokens.unique().to(head.device)
    head[words] -= (3 * drift / drift.square().sum()).to(head.dtype)  # where it ends, 3 nats are lost


def two_gpus(bench: Bench) -> dict[str, Any]:
    """The loss of a text by a model that lies on several GPUs."""
    from accelerate import dispatch_model, infer_auto_device_map

    shape = "bamba-30b"
    bench.free()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(bench.config(shape), dtype=bench.dtype)
    gpus: dict[int | str, Any] = {i: int(torch.cuda.mem_get_info(i)[0] * 0.8) for i in bench.gpus()}
    if bench.cuda:  # as evenly as from_pretrained's device_map="auto"
        bytes_ = sum(p.numel() * p.element_size() for p in model.parameters())
        gpus = {i: min(most, int(bytes_ / len(gpus) * 1.05)) for i, most in gpus.items()}
        gpus[len(gpus) - 1] = int(torch.cuda.mem_get_info(len(gpus) - 1)[0] * 0.8)
    place = infer_auto_device_map(
        model,
        max_memory=gpus or {"cpu": 1 << 40},
        no_split_module_classes=list(model._no_split_modules or ()),
    )
    model = _materialised(model, place, bench)
    if len(set(place.values())) > 1:
        model = dispatch_model(model, place)
    lm = longroll.RecurrentLM(model.eval(), name=shape)
    length = bench.size(131_072, 512)
    tokens = bench.tokens(lm, 1, length)
    longroll.position_loss(lm, tokens[:, : length // 16 + 1])
    found = bench.timed(partial(longroll.position_loss, lm, tokens), repeats=1, warm_up=False)
    found |= {"length": length, "tokens_per_second": length / found["median_seconds"], **weights(lm)}
    found["modules"] = dict(Counter(map(str, place.values())))
    return found


def _materialised(model: Any, place: dict[str, Any], bench: Bench) -> Any:
    """A model on the meta device, with random weights where `place` says."""
    for name, module in model.named_modules():
        where = next((place[p] for p in _prefixes(name) if p in place), None)
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            on = place.get(f"{name}.{leaf}", where)
            module.register_parameter(leaf, torch.nn.Parameter(torch.empty_like(parameter, device=on)))
        for leaf, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(leaf, torch.empty_like(buffer, device=where), persistent=False)
    model.init_weights()
    return model


def _prefixes(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def float16(bench: Bench) -> dict[str, Any]:
    """Loss of the 370M Mamba-2 in float16, its SSD in kernels that multiply in tf32 and in PyTorch, beside
    bfloat16.
    """
    found, usual = dict[str, dict[str, Any]](), _backend.TF32_FOR_FLOAT16
    for name, dtype, tf32 in (
        ("bfloat16", torch.bfloat16, usual),
        ("float16, tf32", torch.float16, True),
        ("float16, PyTorch", torch.float16, False),
    ):
        lm = bench.model("mamba2-370m", dtype)
        tokens = bench.tokens(lm, 1, bench.size(131_072, 512))
        _backend.TF32_FOR_FLOAT16 = tf32
        loss = longroll.position_loss(lm, tokens)
        found[name] = bench.timed(partial(longroll.position_loss, lm, tokens), warm_up=False)
        found[name]["loss"] = loss.mean.mean().item()
    _backend.TF32_FOR_FLOAT16 = usual
    exact, tf32, torch_ = (row["median_seconds"] for row in found.values())
    return {
        "median_seconds": tf32,
        "times_bfloat16": tf32 / exact,
        "times_bfloat16_in_pytorch": torch_ / exact,
        "dtypes": found,
    }


# ---- training


class _Rows(Dataset):
    """Random rows, as `longroll.data.Windows` gives them."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.tokens[index]
        return {"input_ids": row[:-1], "shift_labels": row[1:], "starts": torch.tensor(True)}


class _Clock(TrainerCallback):
    """Seconds of each step, without waiting for the GPU within the run."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.marks, self.losses = bench, [], []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self.bench.cuda:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
            self.marks.append(mark)
        else:
            self.marks.append(time.perf_counter())

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])

    def seconds(self) -> list[float]:
        self.bench.wait()
        pairs = zip(self.marks[:-1], self.marks[1:], strict=True)
        if self.bench.cuda:
            return [a.elapsed_time(b) / 1000 for a, b in pairs]
        return [b - a for a, b in pairs]


def posttrain(
    bench: Bench, shape: str, rows: int, length: int, steps: int = 12, **options: Any
) -> dict[str, Any]:
    """Steps of State Passing by the trainer of `posttrain`, with its arguments."""
    rank, int8 = options.pop("lora_rank", 0), options.pop("int8", False)
    lm = bench.model(shape, None if rank else torch.float32)
    if int8:
        to_int8(lm.model, lm.width, keep=False)
    length, steps = bench.size(length, 64), bench.size(steps, 4)
    micro_batches = options.get("accumulation", 1)
    tokens = bench.tokens(lm, rows * micro_batches * steps, length)
    given = PosttrainOptions(
        length=length, steps=steps, batch_size=rows, bf16=True, lora_rank=rank, learning_rate=5e-4, **options
    )
    clock = _Clock(bench)
    model: Any = with_lora(lm.model, rank)
    arguments = trainer_arguments(lm, given, bench.folder / shape)
    arguments.save_strategy = "no"
    trainer = InitialStateTrainer(
        model, arguments, intervention="sp", cuda_graphs=given.cuda_graphs, weights=given.weights,
        train_dataset=_Rows(tokens), callbacks=[clock],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    bench.start()
    trainer.train()
    found = bench.peaks()
    found["seconds"] = clock.seconds()[2:] or clock.seconds()  # the first steps compile
    found["median_seconds"] = statistics.median(found["seconds"])
    found["tokens_per_second"] = rows * micro_batches * length / found["median_seconds"]
    found |= weights(lm) | {
        "rows": rows,
        "length": length,
        "losses": clock.losses,
        "lora_rank": rank,
        "int8": int8,
    }
    found |= {"graphs": trainer._graph is not None} | options
    per_token = (4 if rank else 6) * found["active_parameters"]
    found["mfu"] = _mfu(per_token * found["tokens_per_second"])
    bench.free()  # its weights have changed, or have adapters
    return found


def step(bench: Bench) -> dict[str, Any]:
    """A step of the 370M Mamba-2 as one CUDA graph, State Passing, AdamW."""
    run, lm, rows, length = _step(bench, graphs=bench.cuda)
    for _ in range(bench.size(5, 1)):
        run()
    found = bench.timed(lambda: [run() for _ in range(bench.size(10, 2))], warm_up=False)
    found["median_seconds"] /= bench.size(10, 2)
    found["tokens_per_second"] = rows * length / found["median_seconds"]
    found |= weights(lm)
    found["mfu"] = _mfu(6 * found["parameters"] * found["tokens_per_second"])
    return found


def _step(
    bench: Bench,
    *,
    graphs: bool,
    shape: str = "mamba2-370m",
    rows: int = 4,
    length: int = 2048,
    rank: int = 0,
) -> tuple[Callable[[], Any], longroll.RecurrentLM, int, int]:
    """Return a step, of adapters with gradient checkpointing where they have a rank."""
    from longroll.training.loss import loss_and_state

    length = bench.size(length, 64)
    lm = bench.model(shape, None if rank else torch.float32).train()
    if with_lora(lm.model, rank) is not lm.model:
        lm.model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = bench.tokens(lm, rows, length).to(bench.device)
    trained = [p for p in lm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=bench.cuda)
    passing = longroll.StatePassing()
    graph = StepGraph(lm, dtype=torch.bfloat16) if graphs else None

    def run() -> None:
        state = passing.initial_state({"input_ids": ids})
        if graph is not None:
            _, final = graph(ids[:, :-1], ids[:, 1:], state)
        else:
            with torch.autocast(bench.device.type, torch.bfloat16):
                value, final = loss_and_state(lm, ids[:, :-1], ids[:, 1:], state)
            value.backward()
        optimizer.step()
        optimizer.zero_grad()
        passing.observe(final)

    return run, lm, rows, length


_PROFILED: dict[str, dict[str, Any]] = {
    "step": {},
    "lora": {"shape": "bamba-9.8b", "rows": 2, "length": 4096, "rank": 16},
    "all-weights": {"shape": "mamba2-2.7b", "rows": 3},
}


def profile(bench: Bench, what: str) -> dict[str, Any]:
    """Time on the GPU by kernel, of a step of training or of the SSD of the 370M Mamba-2 alone."""
    run = _both_ways(*_ssd(bench)) if what == "ssd" else _step(bench, graphs=False, **_PROFILED[what])[0]
    for _ in range(3):
        run()
    bench.wait()
    kind = torch.profiler.ProfilerActivity
    activities = [kind.CPU, *([kind.CUDA] if bench.cuda else [])]
    calls = bench.size(4, 1)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(calls):
            run()
        bench.wait()
    kernels: dict[str, list[float]] = {}
    for event in profiler.events():
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        if on_gpu or not bench.cuda:
            length = (event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total) / 1000
            kernels.setdefault(event.name, []).append(length)
    table = [
        {"kernel": name[:160], "calls": len(ms) / calls, "ms": sum(ms) / calls}
        for name, ms in kernels.items()
    ]
    table.sort(key=lambda row: -row["ms"])
    total = sum(row["ms"] for row in table)
    for row in table:
        row["share"] = row["ms"] / total
    if bench.profiles is not None:
        averages = profiler.key_averages()
        by = "self_device_time_total" if bench.cuda else "self_cpu_time_total"
        bench.profiles.mkdir(parents=True, exist_ok=True)
        text = averages.table(sort_by=by, row_limit=80, max_name_column_width=90)
        (bench.profiles / f"profile_{what}.txt").write_text(text)
    if what != "ssd":
        bench.free()  # its weights have changed
    return {"gpu_ms": total, "kernels": table[:60]}


# ---- recurrences


def _ssd(bench: Bench) -> tuple[Callable[[], Any], list[Tensor]]:
    rows, time_, heads, size, state = (4, 2048, 32, 64, 128) if not bench.tiny else (1, 64, 2, 16, 16)

    def draw(*shape: int, dtype: torch.dtype = bench.dtype) -> Tensor:
        return torch.randn(shape, device=bench.device, dtype=dtype).requires_grad_()

    x, dt = draw(rows, time_, heads, size), draw(rows, time_, heads)
    b, c = draw(rows, time_, 1, state), draw(rows, time_, 1, state)
    a = (-torch.rand(heads, device=bench.device) * 8 - 1).requires_grad_()
    skip = draw(heads, dtype=torch.float32)
    bias = (draw(heads, dtype=torch.float32).detach() - 4).requires_grad_()
    initial = draw(rows, heads, size, state, dtype=torch.float32)
    leaves = [x, dt, a, b, c, skip, bias, initial]

    def forward() -> Any:
        return longroll.ops.ssd(
            x, dt, a, b, c, skip, None, bias, True, initial_state=initial, output_final_state=True
        )

    return forward, leaves


def _both_ways(forward: Callable[[], Any], leaves: list[Tensor]) -> Callable[[], None]:
    def both() -> None:
        outputs = forward()
        torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])

    return both


def recurrence(bench: Bench, what: str) -> dict[str, Any]:
    """SSD of the 370M Mamba-2, forward and backward with states: calls as they are, and as a CUDA graph."""
    forward, leaves = _ssd(bench)
    both = _both_ways(forward, leaves)
    found = bench.timed(lambda: [both() for _ in range(bench.size(50, 1))])
    found["ms"] = found["median_seconds"] * 1000 / bench.size(50, 1)
    if bench.cuda:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.stream(stream):
            both()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            both()
        replayed = bench.timed(lambda: [graph.replay() for _ in range(50)])
        found["graph_ms"] = replayed["median_seconds"] * 1000 / 50
    return found


def scan(bench: Bench) -> dict[str, Any]:
    """Mamba-1's scan with states beside mamba-ssm's without, where that is installed."""
    if not bench.cuda:
        return {"skipped": "the scan's kernels need a GPU"}
    from gpu_ops import measured, scans

    return {"ways": measured("selective_scan", scans())}


def _mfu(flops: float) -> float | None:
    peak = PEAK.get(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return flops / peak if peak else None


LORA = {"lora_rank": 16, "gradient_checkpointing": True}
ROWS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "ssd": partial(recurrence, what="ssd"),
    "profile-ssd": partial(profile, what="ssd"),
    "scan": scan,
    "step": step,
    "profile-step": partial(profile, what="step"),
    "loss": partial(loss, shape="bamba-9.8b", length=131_072, repeats=2),
    "diagnose": partial(diagnose, explain=False),
    "diagnose-causes": partial(diagnose, explain=True),
    "lora": partial(posttrain, shape="bamba-9.8b", rows=2, length=4096, **LORA),
    "lora-int8": partial(posttrain, shape="bamba-9.8b", rows=2, length=4096, int8=True, **LORA),
    "all-weights": partial(posttrain, shape="mamba2-2.7b", rows=4, length=2048, cuda_graphs=False),
    "all-weights-graphs": partial(posttrain, shape="mamba2-2.7b", rows=3, length=2048, cuda_graphs=True),
    "all-weights-accumulated": partial(
        posttrain, shape="mamba2-2.7b", rows=3, length=2048, steps=8, accumulation=4, cuda_graphs=False
    ),
    "profile-lora": partial(profile, what="lora"),
    "profile-all-weights": partial(profile, what="all-weights"),
    "million": partial(loss, shape="bamba-1b", length=1_048_576, repeats=1),
    "million-8k": partial(loss, shape="bamba-1b", length=1_048_576, repeats=1, chunk_size=8192),
    "float16": float16,
    "qwen3-next-loss": partial(loss, shape="qwen3-next-6b", length=65_536, repeats=2),
    "qwen3-next-lora": partial(posttrain, shape="qwen3-next-6b", rows=2, length=4096, **LORA),
    "nemotron-h-loss": partial(loss, shape="nemotron-h-8b", length=65_536, repeats=2),
    "nemotron-h-lora": partial(posttrain, shape="nemotron-h-8b", rows=2, length=4096, **LORA),
    "falcon-h1-loss": partial(loss, shape="falcon-h1-7b", length=65_536, repeats=2),
    "falcon-h1-lora": partial(posttrain, shape="falcon-h1-7b", rows=2, length=4096, **LORA),
    "two-gpus": two_gpus,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ROWS, help="rows, in this order; default: all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models and short texts")
    parser.add_argument("--profiles", type=Path, help="folder for the whole tables of the profiler")
    parser.add_argument("--json", help="write the results here, after every row")
    options = parser.parse_args()
    began = time.perf_counter()
    table: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        device = torch.device(options.device)
        bench = Bench(device, options.tiny, options.repeats, Path(folder), options.profiles)
        for name in options.only or ROWS:
            if name == "two-gpus" and len(bench.gpus()) < 2 and not options.tiny:
                continue
            started = time.perf_counter()
            try:
                table[name] = ROWS[name](bench)
            except Exception as error:  # one row that does not run here must not end the table
                first = (str(error).splitlines() or [""])[0]
                table[name] = {"error": f"{type(error).__name__}: {first[:300]}"}
                if isinstance(error, torch.OutOfMemoryError):
                    table[name]["largest_tensors"] = _largest_tensors()
            if "error" in table[name]:  # its frames hold the model no more
                bench.free()
            table[name]["row_seconds"] = time.perf_counter() - started
            print(f"{name:18} {_said(table[name])}", flush=True)
            if options.json:
                made = provenance(seed=0, seconds=time.perf_counter() - began, device=options.device)
                given = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
                result = {"what": "big", "options": given, "rows": table, "provenance": made}
                BenchmarkResult.from_json(result).write(options.json)


def _largest_tensors(most: int = 15) -> list[dict[str, Any]]:
    """What lies on the GPUs, by shape, the largest first."""
    found: dict[tuple[str, ...], list[int]] = {}
    for each in gc.get_objects():
        if type(each) in (Tensor, torch.nn.Parameter) and each.is_cuda:
            kind = (type(each).__name__, str(each.dtype), str(tuple(each.shape)))
            found.setdefault(kind, []).append(each.untyped_storage().nbytes())
    ranked = sorted(found.items(), key=lambda pair: -sum(pair[1]))[:most]
    return [{"tensor": " ".join(k), "count": len(b), "gib": sum(b) / 2**30} for k, b in ranked]


def _said(row: dict[str, Any]) -> str:
    """A row in one line."""
    if "error" in row or "skipped" in row:
        return row.get("error") or row["skipped"]
    names = (
        "ms", "graph_ms", "gpu_ms", "median_seconds", "times_the_loss", "times_bfloat16",
        "tokens_per_second", "mfu",
        "peak_gib",
        "times_the_peak", "verdict", "row_seconds",
    )  # fmt: skip
    return ", ".join(f"{name} {_short(row[name])}" for name in names if row.get(name) is not None)


def _short(value: Any) -> str:
    if isinstance(value, list):
        return " + ".join(map(_short, value))
    return f"{value:,.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
