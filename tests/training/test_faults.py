"""A state or loss that is not finite, signals, too little memory: what a run says, and what it keeps."""

import json
import math
import os
import signal

import pytest
import ranked
import torch
import torch.distributed as dist
from ranked import run
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial
from transformers import TrainerCallback, TrainingArguments

from longroll import InitialStateTrainer, LongrollError, StateKey
from longroll.training import checkpoints, guard
from zoo import build

OPTIONS = {"length": 8, "steps": 6, "batch_size": 2, "learning_rate": 1e-2, "save_steps": 2}


class At(TrainerCallback):
    """Calls a function at the beginning of a step."""

    def __init__(self, step, function):
        self.step, self.function = step, function

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            self.function(_["model"], _["optimizer"])


def run_with(callback, output, monkeypatch, kind="sp", **more):
    with monkeypatch.context() as patch:
        patch.setattr(ranked, "Killed", lambda *_: callback)
        return run(kind, str(output), options=OPTIONS | more, kill=0)


def ready(folder):
    """A trainer between its first backward pass and the step."""
    trainer = InitialStateTrainer(build("mamba2"), TrainingArguments(str(folder), use_cpu=True, report_to=[]))
    trainer._tr_loss = torch.zeros(())
    return trainer


def saved(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("layer", "head"), [(0, 1), (1, 0)])
def test_a_state_that_is_not_finite_is_named_before_the_optimizer_moves(layer, head, tmp_path, monkeypatch):
    """The final state alone, which no loss of its batch reads."""
    weights = {}
    see = guard.Guard.see

    def see_spoilt(self, final_state):
        if self.step_begun:
            spoilt = final_state.detach().map(torch.clone)
            spoilt[StateKey(layer, "recurrent")][1, head, 0, 0] = torch.inf
            final_state = spoilt
        see(self, final_state)

    def note(model, _):
        guard.Guard.step_begun = True
        weights.update({name: p.detach().clone() for name, p in model.named_parameters()})

    monkeypatch.setattr(guard.Guard, "see", see_spoilt)
    monkeypatch.setattr(guard.Guard, "step_begun", False, raising=False)
    kept = {}
    original = guard.Guard.before_step

    def before_step(self, optimizer, *args, **kwargs):
        try:
            original(self, optimizer, *args, **kwargs)
        except LongrollError:
            kept.update({id(p): p.detach().clone() for g in optimizer.param_groups for p in g["params"]})
            raise

    monkeypatch.setattr(guard.Guard, "before_step", before_step)
    with pytest.raises(LongrollError, match=f"Step 4: the state of layer {layer}, head {head} is not finite"):
        run_with(At(3, note), tmp_path / "out", monkeypatch)
    assert sorted(t.sum().item() for t in kept.values()) == sorted(t.sum().item() for t in weights.values())
    newest = checkpoints.newest_whole(tmp_path / "out" / "checkpoints")
    assert newest.name == "checkpoint-2" and not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("kind", ["none", "sp", "fitted"])
def test_a_loss_that_is_not_finite_stops_at_its_step(kind, tmp_path, monkeypatch):
    def spoil(model, _):
        with torch.no_grad():
            model.get_output_embeddings().weight[3, 0] = torch.nan

    with pytest.raises(LongrollError, match=r"Step 4: .* is not finite.*`learning_rate`"):
        run_with(At(3, spoil), tmp_path / "out", monkeypatch, kind)
    assert all(t.isfinite().all() for t in saved(tmp_path / "out" / "checkpoints" / "checkpoint-2").values())


@pytest.mark.parametrize("wrapped", [True, False])
def test_the_guard_is_given_torchs_optimizer(wrapped, tmp_path, monkeypatch):
    """Accelerate wraps it; `found_inf` must be set on torch's own."""
    trainer, given = ready(tmp_path), []
    optimizer = trainer.create_optimizer()
    if wrapped:
        trainer.optimizer = trainer.accelerator.prepare(optimizer)
        assert trainer.optimizer is not optimizer
    monkeypatch.setattr(trainer._guard, "before_step", lambda *args, **_: given.append(args[0]))
    trainer._get_grad_norm(trainer.model, grad_norm=torch.ones(()))
    assert len(given) == 1 and given[0] is optimizer


def test_a_sharded_gradient_norm_is_read_whole(tmp_path):
    """FSDP2 gives a DTensor."""
    trainer = ready(tmp_path)
    trainer.create_optimizer()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        finite, infinite = (
            DTensor.from_local(torch.tensor(norm), mesh, [Partial()]) for norm in (1.0, torch.inf)
        )
        trainer._get_grad_norm(trainer.model, grad_norm=finite)
        with pytest.raises(LongrollError, match=r"Step 1: .*gradient is not finite"):
            trainer._get_grad_norm(trainer.model, grad_norm=infinite)
    finally:
        dist.destroy_process_group()


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    """Set by what the guard does not see: between the last step and the save."""

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            if state.global_step == 6:
                with torch.no_grad():
                    next(model.parameters()).view(-1)[0] = torch.inf

    with pytest.raises(LongrollError, match=r"weights .* are not finite"):
        run_with(Spoil(), tmp_path / "out", monkeypatch)
    assert checkpoints.newest_whole(tmp_path / "out" / "checkpoints").name == "checkpoint-4"
    assert not (tmp_path / "out" / "config.json").exists()


def test_finite_weights_whose_loss_is_not_are_not_saved(tmp_path, monkeypatch):
    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            if state.global_step == 6:
                with torch.no_grad():
                    model.get_output_embeddings().weight.fill_(3e38)

    with pytest.raises(LongrollError, match="loss with the trained weights is not finite"):
        run_with(Spoil(), tmp_path / "out", monkeypatch)
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_batch_without_targets_has_no_loss():
    guard.check_loss(math.nan, torch.full((1, 3), -100))
    with pytest.raises(LongrollError):
        guard.check_loss(math.nan, torch.tensor([[-100, 2]]))


@pytest.mark.parametrize(
    ("number", "ends"),
    [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt), (signal.SIGHUP, SystemExit)],
    ids=str,
)
def test_a_signal_finishes_the_step_and_saves(number, ends, tmp_path, monkeypatch):
    before = signal.getsignal(number)
    with pytest.raises(ends):
        run_with(At(2, lambda *_: os.kill(os.getpid(), number)), tmp_path / "out", monkeypatch, "tbptt")
    assert signal.getsignal(number) == before
    assert checkpoints.newest_whole(tmp_path / "out" / "checkpoints").name == "checkpoint-3"
    run("tbptt", str(tmp_path / "out"), options=OPTIONS, resume=True)
    run("tbptt", str(tmp_path / "never"), options=OPTIONS)
    one, other = saved(tmp_path / "out"), saved(tmp_path / "never")
    assert all(one[name].equal(other[name]) for name in other)
    logs = [json.loads((tmp_path / name / "log.json").read_text()) for name in ("out", "never")]
    assert [entry.get("loss") for entry in logs[0]] == [entry.get("loss") for entry in logs[1]]


def test_signals_that_are_ignored_stay_so(tmp_path, monkeypatch):
    """As nohup has it for SIGHUP, and a shell for SIGINT of what runs in the background."""
    numbers = (signal.SIGHUP, signal.SIGINT)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        for number in numbers:
            end = At(2, lambda *_, number=number: os.kill(os.getpid(), number))
            run_with(end, tmp_path / number.name, monkeypatch, "tbptt")
            assert (tmp_path / number.name / "config.json").exists()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_terminal_that_closes_ends_a_run_with_a_checkpoint(tmp_path, monkeypatch):
    """Writing to it is an error from then on."""
    mine, (terminal, shown) = os.dup(1), os.openpty()

    def close(*_):
        os.close(terminal)
        with pytest.raises(OSError, match="Input/output"):
            os.write(1, b"step")
        os.kill(os.getpid(), signal.SIGHUP)
        os.write(1, b"step")

    os.dup2(shown, 1)
    try:
        with pytest.raises(SystemExit, match=str(128 + signal.SIGHUP)):
            run_with(At(2, close), tmp_path / "out", monkeypatch)
    finally:
        os.dup2(mine, 1)
        os.close(mine), os.close(shown)
    assert checkpoints.newest_whole(tmp_path / "out" / "checkpoints").name == "checkpoint-3"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()], ids=str)
def test_too_little_memory_says_what_would_fit(error, tmp_path, monkeypatch):
    def die(*_):
        raise error

    with pytest.raises(LongrollError, match=r"2 x 8 tokens.*`batch_size` 1 with `accumulation` 2"):
        run_with(At(1, die), tmp_path / "out", monkeypatch)


@pytest.mark.parametrize("kind", ["sp", "tbptt", "fitted"])
@pytest.mark.parametrize(("accumulation", "step"), [(1, 4), (2, 3)])  # row 1 goes on there
def test_a_state_that_is_not_finite_is_dropped_and_counted(kind, accumulation, step, tmp_path, caplog):
    """The step is skipped: weights do not move, healthy rows keep their states, and all is counted."""
    seen = {}

    class Note(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **_):
            carried = poison.intervention
            memory = carried.moments if kind == "fitted" else carried.passed
            seen[state.global_step] = [p.detach().clone() for p in model.parameters()], memory

    make = ranked.Poisoned

    def poison_after(intervention, *where):
        nonlocal poison
        poison = make(intervention, *where)
        return poison

    poison = None
    options = OPTIONS | {"on_not_finite": "drop", "accumulation": accumulation}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranked, "Poisoned", poison_after)
        patch.setattr(ranked, "Killed", lambda *_: Note())
        _, log = run(kind, str(tmp_path / "out"), options=options, poison=[step, 1], kill=0)
    (weights, before), (same, after) = seen[step], seen[step + 1]
    assert all(one.equal(other) for one, other in zip(weights, same, strict=True))
    assert not all(one.equal(other) for one, other in zip(seen[step - 1][0], weights, strict=True))
    if kind == "fitted":
        assert all(after[key].equal(before[key]) for key in before)
    else:
        recurrent = after.part("recurrent")
        assert all(not t[1].any() and t[0].any() for t in recurrent.values())
    (entry,) = (entry for entry in log if "not_finite" in entry)
    assert entry["not_finite_step"] == step + 1 and entry["states_dropped"] == (0 if kind == "fitted" else 1)
    assert f"Step {step + 1}: " in caplog.text and "is not finite. The optimizer did not move" in caplog.text
    assert all(math.isfinite(entry["loss"]) for entry in log if "loss" in entry)
    assert all(t.isfinite().all() for t in saved(tmp_path / "out").values())


@pytest.mark.parametrize("kind", ["none", "sp", "random"])
def test_a_run_whose_weights_are_spoilt_stops_though_it_drops_states(kind, tmp_path, monkeypatch):
    def spoil(model, _):
        with torch.no_grad():
            model.get_output_embeddings().weight[3, 0] = torch.nan

    with pytest.raises(LongrollError, match=r"Step 8: .* is not finite, as in the 4 steps before"):
        run_with(
            At(3, spoil), tmp_path / "out", monkeypatch, kind, on_not_finite="drop", steps=12, save_steps=50
        )


def test_dropping_nothing_changes_nothing(tmp_path):
    for name, choice in (("stop", "stop"), ("drop", "drop")):
        run("sp", str(tmp_path / name), options=OPTIONS | {"on_not_finite": choice})
    one, other = saved(tmp_path / "stop"), saved(tmp_path / "drop")
    assert all(one[name].equal(other[name]) for name in other)


def test_another_choice_is_refused():
    with pytest.raises(LongrollError, match=r"`on_not_finite` 'ignore' is none of stop, drop"):
        guard.Guard("ignore")
