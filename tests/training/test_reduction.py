"""Gradients summed over ranks while backward goes on."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from longroll.training import _reduction

RANKS = 2


def _work(rank: int, file: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 11))
    model[3].weight = model[0].weight
    ids = torch.randint(11, (RANKS, 5))
    losses = [model(row).logsumexp(-1).sum() for row in ids]
    parameters = list(model.parameters())
    expected = torch.autograd.grad(sum(losses), parameters, retain_graph=True)
    for bucket in (1, 600, 1 << 20):  # each by itself, some together, all together
        _reduction.BUCKET = bucket
        model.zero_grad()
        with _reduction.Reduction(parameters):
            losses[rank].backward(retain_graph=True)
        for parameter, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
        storages = {p.grad.untyped_storage().data_ptr() for p in parameters}
        assert len(storages) == {1: len(parameters), 600: len(storages), 1 << 20: 1}[bucket]
    model.zero_grad()
    losses[rank].backward()  # no hook is left: nothing is exchanged
    assert not all(torch.equal(p.grad, g) for p, g in zip(parameters, expected, strict=True))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
def test_sums_are_those_of_all_rows(tmp_path):
    mp.spawn(_work, (str(tmp_path / "store"),), RANKS)
