"""The loss is taken in pieces under DDP, FSDP2 and LoRA too: the same numbers, without all logits."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

from longroll.interventions import StatePassing
from longroll.training import InitialStateTrainer
from longroll.training import loss as losses
from longroll.training.lora import with_lora
from zoo import VOCAB, assert_close, assert_same_state, build, tokens

FAMILIES = ["mamba2", "bamba", "granitemoehybrid", "gla"]
ROWS, TIME = 3, 13


@pytest.fixture
def alone(tmp_path):
    """A group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _fsdp(model):
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.base_model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _accelerated(model):
    """As accelerate 1.15 does: the last norm and the output embedding are one group."""
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.base_model.layers:
        fully_shard(layer, mesh=mesh)
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    norm = [m for _, m in model.base_model.named_children() if "Norm" in type(m).__name__][-1:]
    shared = [inputs] if inputs.weight is outputs.weight else []
    fully_shard([*norm, *shared, outputs], mesh=mesh, reshard_after_forward=False)
    return fully_shard(model, mesh=mesh)


def _lora(model):
    adapted = with_lora(model, 2)
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return adapted


WAYS = {
    "ddp": (lambda model: model, DistributedDataParallel),
    "fsdp": (lambda model: model, _fsdp),
    "fsdp of accelerate": (lambda model: model, _accelerated),
    "lora": (_lora, lambda model: model),
    "ddp of lora": (_lora, DistributedDataParallel),
}
"""Name -> what becomes of the model, and what Trainer does to it then."""


def _measured(name, way, bf16, tmp_path, monkeypatch, *, pieces):
    """Loss, final state, gradients and the most tokens that had logits at once."""
    monkeypatch.setattr(losses, "LOGITS", 4 * VOCAB)
    monkeypatch.setattr(losses, "_WIDTHS", 0)
    model = build(name).train()
    most = []
    model.get_output_embeddings().register_forward_hook(
        lambda _, inputs, output: most.append(output.shape[:-1].numel() if output.ndim else 0)
    )
    adapt, wrap = WAYS[way]
    trained = adapt(model)
    passing = StatePassing()
    given = TrainingArguments(str(tmp_path), use_cpu=True, bf16=bf16, report_to="none")
    trainer = InitialStateTrainer(trained, given, intervention=passing)
    if not pieces:
        monkeypatch.setattr(trainer, "_only_forwards", lambda _: False)
    wrapped = wrap(trained).train()
    ids = tokens(ROWS, TIME + 1)
    batch = {"input_ids": ids[:, :-1], "shift_labels": ids[:, 1:].masked_fill(ids[:, 1:] % 5 == 0, -100)}
    for _ in range(2):  # from zero, then from the state that was passed
        wrapped.zero_grad()
        with trainer.accelerator.autocast():
            loss = trainer.compute_loss(wrapped, dict(batch), num_items_in_batch=torch.tensor(29))
        loss.backward()
    found = {name: p.grad for name, p in trained.named_parameters() if p.grad is not None}
    gradients = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}
    return loss.detach(), passing.passed, gradients, max(most)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_in_pieces_it_is_the_whole(name, way, bf16, alone, tmp_path, monkeypatch):
    loss, state, gradients, most = _measured(name, way, bf16, tmp_path, monkeypatch, pieces=True)
    expected, final, others, all_tokens = _measured(name, way, bf16, tmp_path, monkeypatch, pieces=False)
    assert most <= 4 and all_tokens == ROWS * TIME
    assert_close(loss, expected, 2e-3 if bf16 else 1e-5)
    assert_same_state(state, final)
    assert gradients.keys() == others.keys() and gradients
    for key, gradient in gradients.items():
        assert_close(gradient, others[key], 3e-2 if bf16 else 1e-4, key)
