"""Training on several GPUs of one machine: DDP, FSDP2, interventions, and a killed run, by one command.

    python benchmarks/ranks_gpu.py --json ranks.json                 # on all GPUs; starts torchrun itself
    python benchmarks/ranks_gpu.py --shape toy --big toy --device cpu --ranks 2   # checks the script

Parts, each in processes of its own, which import side by side and then take turns on the GPUs:

- `ddp N`: InitialStateTrainer on N GPUs, a Mamba-2 of 370M's shape (random weights), bf16, AdamW. One Trainer
  takes turns of a few steps with each intervention, so that a drift of the machine falls on all of them;
  overheads are medians over the turns of an intervention's time to that of the zero state's.
- `fsdp`: all weights of a Mamba-2 of 2.7B's shape under FSDP2, State Passing.
- `lora`: LoRA adapters of rank 16 on the same shape in bfloat16, under FSDP2.
- `killed`: `posttrain` undisturbed, twice, and killed by SIGKILL on every rank in the midst; `resumed`: that
  run goes on. The weights of all are compared bit by bit; where those of the undisturbed runs differ, runs
  with `deterministic` are killed and compared instead (with `--deterministic`: all of them).
- `settings`: as `ddp` on all GPUs, from the zero state, with other settings of DDP.

MFU counts 6 flops a parameter and token (4 for LoRA, which needs no gradient of frozen weights), no
recurrence. Results are written after each part; a part that no time is left for is named in `left_out`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()
ROWS = ("zero", "sp", "tbptt", "fitted", "random")
SHAPES = {
    "370m": (1024, 48), "2.7b": (2560, 64), "130m": (768, 24), "mamba-130m": (768, 24),
    "toy": (64, 2), "mamba-toy": (64, 2),
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "known": {"ddp_find_unused_parameters": False},
    "buckets": {"ddp_bucket_cap_mb": 200},
    "graphs": {"cuda_graphs": True},
}
PEAK = 989.4e12  # dense bf16 of H100 SXM and H200, from the data sheets
KILLED_AT, STEPS, SAVE = 4, 6, 3


# ---- the parent: starts the parts and writes what they found


def parts(ranks: list[int], most: int, only: list[str] | None) -> list[tuple[str, int, list[str]]]:
    """Name, processes and work of each part, the most important first."""
    first = [(f"ddp {n}", n, [f"ddp {n}"]) for n in sorted(ranks)]
    found = [*first, ("several", most, ["fsdp", "killed"]), ("resumed", most, ["resumed"])]
    found += [("more", most, ["lora", *(f"settings {name}" for name in SETTINGS)])]
    found = [
        (name, n, [work for work in works if not only or work.split()[0] in only]) for name, n, works in found
    ]
    return [part for part in found if part[2]]


def launch(name: str, processes: int, works: list[str], place: Path, ranks: list[int]) -> Any:
    """Start the processes of a part, which wait for their turn once they have imported."""
    worker = [str(Path(__file__).resolve()), *sys.argv[1:], "--place", str(place)]
    worker += ["--worker", json.dumps(works), "--ranks", *map(str, ranks)]
    command = [sys.executable, *worker]
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--rdzv-backend=c10d"]
        command = [sys.executable, *torchrun, "--rdzv-endpoint=localhost:0", *worker]
    environment = os.environ | {"TURN": str(place / f"{name}.turn"), "PARENT": str(os.getpid())}
    if processes == 1:  # else Trainer would spread one process over all GPUs
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    log = (place / f"{name}.log").open("w")
    return subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )


def parent(options: argparse.Namespace) -> None:
    memory = shutil.disk_usage("/dev/shm").free > 32 << 30
    place = Path(tempfile.mkdtemp(prefix="ranks_gpu_", dir="/dev/shm" if memory else None))
    found: dict[str, Any] = {"parts": {}, "left_out": []}
    all_parts = parts(options.ranks, max(options.ranks), options.only)
    running = {name: launch(name, n, works, place, options.ranks) for name, n, works in all_parts}
    try:
        while options.after and not options.after.exists() and time.perf_counter() - BEGAN < options.budget:
            time.sleep(0.2)
        for name, _, works in all_parts:
            (place / f"{name}.turn").touch()
            while running[name].poll() is None and time.perf_counter() - BEGAN < options.budget:
                time.sleep(0.2)
                collect(place, found, options)
            stop(running[name])
            collect(place, found, options)
            missing = [work for work in works if work not in found["parts"]]
            found["left_out"] += missing
            if missing:
                sys.stdout.write((place / f"{name}.log").read_text()[-3000:])
    finally:
        for process in running.values():
            stop(process)
        compare(place, found, options)
        write(found, options)
        if options.output_of:
            options.output_of.mkdir(parents=True, exist_ok=True)
            for log in place.glob("*.log"):
                shutil.copy(log, options.output_of)
        shutil.rmtree(place, ignore_errors=True)


def stop(process: Any) -> None:
    """End what a part started: torchrun's processes end when they no longer see this one, or by torchrun."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def collect(place: Path, found: dict[str, Any], options: argparse.Namespace) -> None:
    """Take what the parts have written since."""
    new = [file for file in sorted(place.glob("*.json")) if file.stem not in found["parts"]]
    for file in new:
        found["parts"][file.stem] = json.loads(file.read_text())
        part = json.dumps(found["parts"][file.stem])
        print(f"{time.perf_counter() - BEGAN:5.0f} s  {file.stem}: {part}", flush=True)
    if new:
        write(found, options)


def compare(place: Path, found: dict[str, Any], options: argparse.Namespace) -> None:
    """The weights of the killed and resumed run, and of a second one, against the undisturbed one."""
    pairs = {"undisturbed_twice": ("undisturbed", "again"), "killed_and_resumed": ("undisturbed", "run")}
    if (place / "deterministic").is_dir():
        pairs["killed_and_resumed"] = ("deterministic", "run")
    for what, names in pairs.items():
        if all((place / name / "model.safetensors").is_file() for name in names):
            same = options.deterministic or "deterministic" in names
            found[what] = {"deterministic": same, **difference(place, *names)}
            print(what, found[what], flush=True)


def difference(place: Path, one: str, other: str) -> dict[str, Any]:
    """How many tensors of two results differ, and by how much."""
    from safetensors.torch import load_file

    weights = [load_file(place / name / "model.safetensors") for name in (one, other)]
    differ = {
        name: float((tensor - weights[1][name]).abs().max())
        for name, tensor in weights[0].items()
        if not tensor.equal(weights[1][name])
    }
    largest = max(differ.values(), default=0.0)
    return {"tensors": len(weights[0]), "differ": len(differ), "largest_difference": largest}


def write(found: dict[str, Any], options: argparse.Namespace) -> None:
    from longroll.results import BenchmarkResult, provenance

    steps = {name[4:]: part for name, part in found["parts"].items() if name.startswith("ddp ")}
    if "1" in steps:
        one = steps["1"]["rows"]["zero"]["tokens_per_second"]
        found["of_linear"] = {
            n: part["rows"]["zero"]["tokens_per_second"] / (int(n) * one) for n, part in steps.items()
        }
    if options.json:
        made = provenance(seed=0, seconds=time.perf_counter() - BEGAN, device=options.device)
        hidden = ("worker", "place", "json", "after", "output_of")
        kept = {name: value for name, value in vars(options).items() if name not in hidden}
        result = {"what": "ranks_gpu", "options": kept, **found, "provenance": made}
        BenchmarkResult.from_json(result).write(options.json)


# ---- the workers


def worker(options: argparse.Namespace) -> None:
    """The work of one process of a part."""
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher and Path(f"/proc/{os.environ['PARENT']}").exists():
            time.sleep(0.5)
        os._exit(1)  # a process that nobody waits for would keep its GPU

    threading.Thread(target=watch, daemon=True).start()
    import torch

    import longroll.training  # noqa: F401  (what takes long, before the turn)

    torch.set_num_threads(4 if options.device == "cuda" else 1)
    while not Path(os.environ["TURN"]).exists():
        time.sleep(0.05)
    for work in json.loads(options.worker):
        began = time.perf_counter()
        kind, _, name = work.partition(" ")
        try:
            line = WORK[kind](options, name) if kind == "settings" else WORK[kind](options)
        except Exception as error:  # one part must not end the others
            line = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"}
            traceback.print_exc()
        if int(os.environ.get("RANK", "0")) == 0:
            whole = options.place / f".{work}"
            whole.write_text(json.dumps(line | {"seconds": round(time.perf_counter() - began, 1)}))
            whole.rename(options.place / f"{work}.json")
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort an interpreter that ends in order


def model_of(name: str, device: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, Mamba2Config, MambaConfig

    hidden, layers = SHAPES[name]
    torch.manual_seed(0)
    sizes = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "vocab_size": 512 if "toy" in name else 50288,
    }
    config: Any = MambaConfig(**sizes)
    if "mamba" not in name:
        config = Mamba2Config(
            **sizes, num_heads=2 * hidden // 64, head_dim=64, state_size=128, n_groups=1, expand=2
        )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config)


def rows_of(count: int, length: int, vocab: int) -> Any:
    import torch

    class Rows(torch.utils.data.Dataset):
        """Random tokens; in every row a document begins or goes on, as TBPTT wants to know."""

        def __len__(self) -> int:
            return count

        def __getitem__(self, index: int) -> dict[str, Any]:
            ids = torch.randint(vocab, (length + 1,), generator=torch.Generator().manual_seed(index))
            return {"input_ids": ids[:-1], "shift_labels": ids[1:], "starts": torch.tensor(index % 4 == 0)}

    return Rows()


def trainer_of(
    model: Any, options: argparse.Namespace, steps: int, batch: int, length: int, **more: Any
) -> Any:
    from transformers import TrainingArguments

    import longroll

    world = int(os.environ.get("WORLD_SIZE", "1"))
    graphs = more.pop("cuda_graphs", False)
    arguments = TrainingArguments(
        str(options.place / "trainer"), max_steps=steps, per_device_train_batch_size=batch, bf16=True,
        learning_rate=1e-5, report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=10**6,
        logging_nan_inf_filter=False, train_sampling_strategy="sequential", dataloader_num_workers=2,
        use_cpu=options.device == "cpu", **more,
    )  # fmt: skip
    data = rows_of(steps * batch * world, length, model.config.vocab_size)
    return longroll.InitialStateTrainer(model, arguments, train_dataset=data, cuda_graphs=graphs)


class Clock:
    """Times turns of some steps; within a turn nothing waits for the GPU."""

    def __init__(self, trainer: Any, ways: dict[str, Any], steps: int) -> None:
        from transformers import TrainerCallback

        self.trainer, self.ways, self.steps = trainer, ways, steps
        self.seconds: dict[str, list[float]] = {name: [] for name in ways}
        clock = self

        class Turns(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                clock.begin(state.global_step)

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                clock.end(state.global_step)

        trainer.add_callback(Turns())

    def now(self) -> float:
        """Return the time, when the GPU has done its work."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def way(self, step: int) -> str:
        """Return what a step starts from."""
        return list(self.ways)[step // self.steps % len(self.ways)]

    def begin(self, step: int) -> None:
        """Note the time where a turn begins."""
        if step % self.steps == 0:
            self.trainer.intervention = self.ways[self.way(step)]
            self.began = self.now()

    def end(self, step: int) -> None:
        """Note what a step took where a turn ends."""
        if step % self.steps == 0:
            self.seconds[self.way(step - 1)].append((self.now() - self.began) / self.steps)


def speed(clock: Clock, tokens: int, parameters: int, flops: int, device: str) -> dict[str, Any]:
    """Medians over the turns but the first, which compiles: tokens/s of all ranks, MFU, memory."""
    import torch

    world = int(os.environ.get("WORLD_SIZE", "1"))
    rows = {}
    for name, seconds in clock.seconds.items():
        step = statistics.median(seconds[1:])
        zero = clock.seconds["zero" if "zero" in clock.seconds else name][1:]
        both = zip(seconds[1:], zero, strict=True)
        rows[name] = {
            "tokens_per_second": tokens * world / step,
            "mfu": flops * parameters * tokens / step / PEAK if device == "cuda" else None,
            "overhead": statistics.median(own / other for own, other in both) - 1,
            "seconds": [round(s, 4) for s in seconds],
        }
    cuda = device == "cuda"
    return {
        "ranks": world,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "parameters": parameters,
        "tokens_a_rank": tokens,
        "rows": rows,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if cuda else None,
    }


def ddp(options: argparse.Namespace, names: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    import torch

    from longroll.interventions import INTERVENTIONS

    model = model_of(options.shape, options.device)
    all_rows = int(os.environ.get("WORLD_SIZE", "1")) == max(options.ranks)
    names = names or (ROWS if all_rows else ROWS[:2])
    steps = options.steps * options.turns * len(names)
    trainer = trainer_of(model, options, steps, options.batch, options.length, **more)
    ways = {name: INTERVENTIONS[name]() if name != "zero" else None for name in names}
    clock = Clock(trainer, ways, options.steps)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    tokens = options.batch * options.length
    return speed(clock, tokens, sum(p.numel() for p in model.parameters()), 6, options.device)


def fsdp(options: argparse.Namespace, *, adapters: bool = False) -> dict[str, Any]:
    import torch

    from longroll.interventions import StatePassing
    from longroll.training.lora import with_lora
    from longroll.training.weights import set_precision

    device = f"cuda:{os.environ['LOCAL_RANK']}" if options.device == "cuda" else "cpu"
    model = model_of(options.big, device)
    parameters = sum(p.numel() for p in model.parameters())
    if adapters:
        set_precision(model, torch.bfloat16)
        model = with_lora(model, 16)
    turns, steps = 3, 3
    trainer = trainer_of(model, options, turns * steps, options.big_batch, options.length, fsdp=True)
    clock = Clock(trainer, {"sp": StatePassing()}, steps)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    tokens = options.big_batch * options.length
    found = speed(clock, tokens, parameters, 4 if adapters else 6, options.device)
    found["trained"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return found


def lora(options: argparse.Namespace) -> dict[str, Any]:
    return fsdp(options, adapters=True)


def settings(options: argparse.Namespace, name: str) -> dict[str, Any]:
    return ddp(options, ("zero",), **SETTINGS[name])


def post_train(
    options: argparse.Namespace, output: Path, *, deterministic: bool = False, **more: Any
) -> dict[str, Any]:
    import numpy as np

    from longroll import RecurrentLM, StatePassing
    from longroll.data import Corpus
    from longroll.training import PosttrainOptions, posttrain

    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if options.device == "cuda" else "cpu"
    lm = RecurrentLM(model_of(options.shape, device))
    ids = np.random.default_rng(0).integers(0, lm.vocab_size, 1 << 20).astype(np.int32)
    corpus = Corpus(ids, np.arange(0, len(ids) + 1, 1 << 16, dtype=np.int64), len(ids))
    settings = PosttrainOptions(
        length=options.length, steps=STEPS, batch_size=4, save_steps=SAVE, learning_rate=1e-4, bf16=True,
        deterministic=deterministic,
    )  # fmt: skip
    began = time.perf_counter()
    log = posttrain(lm, corpus, StatePassing(), settings, output, **more)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    return {"losses": losses, "posttrain_seconds": round(time.perf_counter() - began, 1)}


def killed(options: argparse.Namespace) -> dict[str, Any]:
    """Two undisturbed runs; then one that every rank ends by SIGKILL, after which nothing is left to run."""
    from transformers import TrainerCallback

    class Kill(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == KILLED_AT:
                os.kill(os.getpid(), signal.SIGKILL)

    asked = options.deterministic
    line = post_train(options, options.place / "undisturbed", deterministic=asked)
    line["again"] = post_train(options, options.place / "again", deterministic=asked)
    deterministic = not asked and difference(options.place, "undisturbed", "again")["differ"] > 0
    if deterministic:
        line["deterministic"] = post_train(options, options.place / "deterministic", deterministic=True)
    if int(os.environ.get("RANK", "0")) == 0:
        (options.place / "killed.json").write_text(json.dumps(line))
    post_train(options, options.place / "run", deterministic=asked or deterministic, callbacks=[Kill()])
    raise AssertionError("the run was not killed")


def resumed(options: argparse.Namespace) -> dict[str, Any]:
    deterministic = options.deterministic or (options.place / "deterministic").is_dir()
    return post_train(options, options.place / "run", deterministic=deterministic, resume=True)


WORK = {"ddp": ddp, "fsdp": fsdp, "lora": lora, "settings": settings, "killed": killed, "resumed": resumed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="370m")
    parser.add_argument("--big", choices=SHAPES, default="2.7b", help="under FSDP2")
    parser.add_argument("--batch", type=int, default=16, help="rows of each rank")
    parser.add_argument("--big-batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--turns", type=int, default=5, help="the first is not counted")
    parser.add_argument("--steps", type=int, default=4, help="of a turn")
    parser.add_argument("--ranks", type=int, nargs="+", help="default: 1, 2, 4, ... as there are GPUs")
    parser.add_argument("--only", nargs="+", choices=WORK, help="default: all")
    parser.add_argument("--budget", type=float, default=210, help="seconds, after which no part goes on")
    parser.add_argument(
        "--deterministic", action="store_true", help="of the killed run, and what it is held to"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--after", type=Path, help="import, and measure once this file exists")
    parser.add_argument("--output-of", type=Path, help="keep the output of the processes in this folder")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ranks is None:
        import torch

        options.ranks = [n for n in (1, 2, 4, 8) if n <= max(1, torch.cuda.device_count())]
    if options.worker:
        worker(options)
    else:
        parent(options)


if __name__ == "__main__":
    main()
