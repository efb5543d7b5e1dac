"""A run in which the state does not reach the loss stops by itself; one in which it does is not changed."""

import functools

import pytest
import torch
from test_trainer import assert_same_weights, data_for, quick_collections, train
from transformers import TrainingArguments

from longroll import (
    TBPTT,
    FittedNoise,
    InitialStateTrainer,
    LongrollError,
    RandomNoise,
    RecurrentState,
    StateKey,
    StatePassing,
)
from longroll.dry_run import Ledger
from longroll.families._cache import StateCache
from longroll.training._live_check import LiveCheck, _foreign
from zoo import build

__all__ = ["quick_collections"]  # a fixture of each test here

KINDS = {"random": RandomNoise, "fitted": FittedNoise, "sp": StatePassing, "tbptt": TBPTT}


def drops_the_cache(model, patch):
    body, forward = model.base_model, model.base_model.forward
    body.forward = lambda *args, **kwargs: forward(*args, **(kwargs | {"cache_params": None}))


def reads_from_zero(model, patch):
    def hook(module, args, kwargs):
        cache = kwargs["cache_params"]
        cache.initial = cache.initial.map(torch.zeros_like)
        return args, kwargs

    model.base_model.register_forward_pre_hook(hook, with_kwargs=True)


def loses_the_gradient(model, patch):
    def hook(module, args, kwargs):
        kwargs["cache_params"].initial = kwargs["cache_params"].initial.detach()
        return args, kwargs

    model.base_model.register_forward_pre_hook(hook, with_kwargs=True)


def recurrence_without_a_state(model, patch):
    patch.setattr(StateCache, "start", lambda *_: None)


class Dropping(torch.nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, cache_params=None, **kwargs):
        return self.body(**kwargs)

    def get_input_embeddings(self):
        return self.body.get_input_embeddings()


def wrapped_body(model, patch):
    model.backbone = Dropping(model.backbone)


BREAKERS = [drops_the_cache, reads_from_zero, loses_the_gradient, recurrence_without_a_state, wrapped_body]
NAMED = {
    "drops_the_cache": "replaced forward of Mamba2Model",
    "reads_from_zero": "forward hook on Mamba2Model",
    "loses_the_gradient": "forward hook on Mamba2Model",
    "recurrence_without_a_state": "does not reach",
    "wrapped_body": "Dropping.*test_live_check",
}


@pytest.mark.parametrize("breaks", BREAKERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", ["sp", "fitted"])
def test_a_run_whose_state_is_lost_stops(breaks, kind, tmp_path, monkeypatch):
    model = build("mamba2")
    breaks(model, monkeypatch)
    with pytest.raises(LongrollError, match=NAMED[breaks.__name__]) as error:
        train(model, KINDS[kind](), data_for(kind), tmp_path)
    assert "\n" not in str(error.value)


def test_the_control_has_nothing_to_lose(tmp_path):
    model = build("mamba2")
    reads_from_zero(model, None)
    model.base_model._forward_pre_hooks.clear()
    drops_the_cache(model, None)
    train(model, None, data_for("sp"), tmp_path)


FULL = {"bf16": True, "activation_checkpointing": True, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in ("mamba", "jamba", "rwkv", "xlstm", "recurrent_gemma", "gla")]
    + [("mamba2", FULL)],
)
@pytest.mark.filterwarnings("ignore")
def test_a_sound_run_is_neither_stopped_nor_changed(name, options, tmp_path, monkeypatch):
    """With dropout in adapters, so that the random numbers of the check would show."""
    from peft import LoraConfig, get_peft_model

    def run():
        model = build(name)
        if name == "mamba2":
            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(r=2, lora_dropout=0.5, target_modules={"in_proj"}))
        train(model, StatePassing(zero_probability=0.3), data_for("sp"), tmp_path, max_steps=3, **options)
        return model

    checked = run()
    monkeypatch.setattr(LiveCheck, "check", lambda self, read, state: None)
    assert_same_weights(run(), checked)


def test_it_costs_two_forwards_of_a_part_of_one_row(tmp_path):
    model, calls = build("mamba2"), []
    model.base_model.register_forward_hook(lambda *given: calls.append(given[2].last_hidden_state.shape[:2]))
    trainer = train(model, StatePassing(), data_for("sp"), tmp_path)
    assert len(calls) == 4 + 2
    whole = max(calls)
    assert calls.count(whole) == 4 and [shape for shape in calls if shape != whole] == [(1, whole[1])] * 2
    trainer.train()
    assert len(calls) == 8 + 4


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_it_takes_less_memory_than_a_step(checkpointing, tmp_path, monkeypatch):
    """Gradient checkpointing keeps what a gradient of the states alone leaves unread."""
    options = {"activation_checkpointing": checkpointing, "max_steps": 3}
    peaks = []
    for check in (LiveCheck.check, lambda self, read, state: None):
        monkeypatch.setattr(LiveCheck, "check", check)
        with Ledger() as ledger:
            model = build("mamba2", num_hidden_layers=8)
            ledger.start()
            train(model, StatePassing(), data_for("sp"), tmp_path / str(len(peaks)), **options)
            peaks.append(ledger.peak)
    assert peaks[0] == peaks[1]


def test_a_partial_is_suspected_where_its_function_is():
    assert not _foreign(functools.partial(torch.nn.Linear.forward)) and _foreign(
        functools.partial(wrapped_body)
    )


def test_no_parameter_has_a_gradient_from_it(tmp_path):
    trainer = InitialStateTrainer(
        build("mamba2"), TrainingArguments(str(tmp_path), use_cpu=True), intervention=StatePassing()
    )
    batch = trainer.data_collator([data_for("sp")[i] for i in range(2)])
    model = trainer.model.train()
    trainer.compute_loss(model, batch)
    assert not trainer._live_check.done
    trainer.compute_loss(model, batch)
    assert trainer._live_check.done and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("answer", [0.0, 1.0])
def test_all_ranks_check_and_stop_where_one_must(answer, monkeypatch):
    """This rank has a zero state and no fault; `answer` is what the other rank says."""

    def all_reduce(tensor, op):
        assert op == torch.distributed.ReduceOp.MAX
        tensor.clamp_min_(answer)

    group = {"is_initialized": lambda: True, "get_world_size": lambda: 2, "get_backend": lambda: "gloo"}
    for name, function in (group | {"all_reduce": all_reduce}).items():
        monkeypatch.setattr(torch.distributed, name, function)
    check, key = LiveCheck(torch.nn.Identity()), StateKey(0, "recurrent")
    zero, one = (RecurrentState({key: torch.full((2, 3, 4), value)}) for value in (0.0, 1.0))
    assert check.due(zero) == bool(answer) and check.due(one)
    if not answer:
        check.check(lambda state: state[key] * 2, one)
        return
    with pytest.raises(LongrollError, match="seen on another rank"):
        check.check(lambda state: state[key] * 2, zero)
