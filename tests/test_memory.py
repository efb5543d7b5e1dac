"""What a plan says of weights, gradients, moments and states, against what a step holds."""

from dataclasses import replace

import pytest
import torch

from longroll import LongrollError, StatePassing, memory
from longroll.families.int8 import to_int8
from longroll.training.lora import with_lora
from longroll.training.loss import loss_and_state
from longroll.training.plan import Setting, outline_of
from zoo import lm_of, tokens


@pytest.mark.parametrize(("rank", "int8"), [(0, False), (2, False), (2, True)])
@pytest.mark.parametrize("family", ["mamba2", "falcon_h1"])
@pytest.mark.filterwarnings("ignore")
def test_weights_gradients_moments_and_states_are_what_a_step_holds(family, rank, int8):
    lm = lm_of(family)
    if int8:
        to_int8(lm.model, lm.width)
    if rank:
        lm.adapted = with_lora(lm.model, rank)
    model = lm.adapted or lm.model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, passing, ids = torch.optim.AdamW(trained), StatePassing(), tokens(3, 17)
    loss, final = loss_and_state(lm, ids[:, :-1], ids[:, 1:])
    loss.backward()
    optimizer.step()
    passing.observe(final)
    setting = Setting(rows=3, length=16, lora_rank=rank, autocast=False, int8=int8)
    found = outline_of(lm_of(family)).training(setting)
    assert found.weights == sum(p.nbytes for p in model.parameters())
    assert found.gradients == sum(p.grad.nbytes for p in trained)
    moments = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    assert found.optimizer == sum(t.nbytes for t in moments)
    assert found.states == 2 * sum(t.nbytes for t in passing.passed.values())  # initial and final ones


@pytest.mark.filterwarnings("ignore")
def test_shards_divide_what_is_not_of_the_rows():
    lm = lm_of("mamba2")
    setting = Setting(rows=2, length=8, autocast=False)
    one, four = (outline_of(lm).training(replace(setting, shards=shards)) for shards in (1, 4))
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(four, name) == getattr(one, name) // 4
    layer = memory.parameter_bytes(lm.model.backbone.layers[0])
    ends = [lm.model.get_input_embeddings(), lm.model.get_output_embeddings()]
    gathered = 2 * layer + sum(map(memory.parameter_bytes, ends))
    assert memory.gathered_bytes(lm.model) == gathered
    assert (four.states, four.logits) == (one.states, one.logits)
    assert four.activations == one.activations + gathered


@pytest.mark.parametrize(("rows", "length"), [(10**9, 16), (2, 10**12), (10**15, 10**15)])
def test_a_micro_batch_that_no_machine_holds_is_refused_with_its_size(rows, length):
    with pytest.raises(
        LongrollError, match=rf"`batch_size` {rows} x `length` {length} takes at least .* GiB"
    ):
        memory.check_micro_batch(lm_of("mamba2"), rows, length)
    memory.check_micro_batch(lm_of("mamba2"), 2, 16)
