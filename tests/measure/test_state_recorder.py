"""Statistics of layers whose heads are put side by side are those of each layer."""

import pytest
import torch

from longroll.measure import _state_statistics as module
from zoo import lm_of, tokens


@pytest.mark.parametrize("room", [1 << 28, 9000], ids=["all layers", "some layers"])
@pytest.mark.parametrize("name", ["mamba", "mamba2", "bamba", "qwen3_next", "rwkv7"])
def test_layers_side_by_side_have_the_statistics_of_each(name, room, monkeypatch):
    lm, ids = lm_of(name, num_hidden_layers=4) if name == "mamba2" else lm_of(name), tokens(5, 40)
    alone = module.state_statistics(lm, ids, [3, 17, 40])
    monkeypatch.setitem(module.AT_ONCE, "cpu", room)
    joined = module.state_statistics(lm, ids, [3, 17, 40])
    assert joined.layer_indices == alone.layer_indices and joined.positions == alone.positions
    for ours, theirs in zip(joined.layers, alone.layers, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-6, atol=1e-9)


def test_layers_are_put_side_by_side_within_the_room(monkeypatch):
    layer = torch.zeros(2, 4, 8, 16)
    monkeypatch.setitem(module.AT_ONCE, "cpu", 3 * layer.nbytes)
    states = [layer] * 7 + [torch.zeros(2, 4, 8, 8)] + [layer, torch.zeros(2, 64, 8), torch.zeros(2, 64, 8)]
    assert [len(group) for group in module._alike(states)] == [3, 3, 1, 1, 1, 1, 1]
