"""Each formula of docs/scaling.md against what is counted on this machine."""

import pytest
import torch

from longroll import LongrollError, StatePassing, memory
from longroll.training.lora import with_lora
from longroll.training.loss import loss_and_state
from zoo import lm_of, tokens

FAMILIES = ["mamba", "mamba2", "falcon_h1", "gla", "rwkv7"]


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("family", ["mamba2", "falcon_h1"])
@pytest.mark.filterwarnings("ignore")
def test_weights_gradients_moments_and_states_are_what_a_step_holds(family, rank):
    lm = lm_of(family)
    if rank:
        lm.adapted = with_lora(lm.model, rank)
    model = lm.adapted or lm.model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, passing, ids = torch.optim.AdamW(trained), StatePassing(), tokens(3, 17)
    loss, final = loss_and_state(lm, ids[:, :-1], ids[:, 1:])
    loss.backward()
    optimizer.step()
    passing.observe(final)
    state = memory.state_bytes(lm.zero_state(1))
    found = memory.training_memory(model, rows=3, length=16, state=state, activations=0.0)
    assert found.weights == sum(p.nbytes for p in model.parameters())
    assert found.gradients == sum(p.grad.nbytes for p in trained)
    moments = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    assert found.optimizer == sum(t.nbytes for t in moments)
    assert found.states == sum(t.nbytes for t in passing.passed.values())
    assert found.gathered == found.activations == found.logits == 0


@pytest.mark.parametrize("family", [*FAMILIES, "llama"])
def test_the_state_keeps_its_size_and_keys_and_values_grow(family):
    lm = lm_of(family)
    _, state = lm(tokens(2, 37))
    found = memory.cache_bytes(lm, 37, rows=2)
    assert found == (
        memory.state_bytes(state, "recurrent", "conv"),
        memory.state_bytes(state, "attention"),
    )
    assert (found[1] > 0) == lm.has_attention


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_grow_with_the_tokens(family):
    lm = lm_of(family)
    per_token = memory.activation_bytes(lm, 128)
    found = memory._saved_bytes(lm, 512)
    assert found == pytest.approx(512 * per_token, rel=0.05)


def test_shards_divide_what_is_not_of_the_rows():
    lm = lm_of("mamba2")
    sizes = {"rows": 2, "length": 8, "state": 1000, "activations": 100.0, "logits": 7.0}
    one, four = (memory.training_memory(lm.model, **sizes, shards=shards) for shards in (1, 4))
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(four, name) == getattr(one, name) // 4
    for name in ("states", "activations", "logits"):
        assert getattr(four, name) == getattr(one, name) > 0
    layer = memory.parameter_bytes(lm.model.backbone.layers[0])
    ends = [lm.model.get_input_embeddings(), lm.model.get_output_embeddings()]
    assert four.gathered == 2 * layer + sum(map(memory.parameter_bytes, ends))


@pytest.mark.parametrize(("rows", "length"), [(10**9, 16), (2, 10**12), (10**15, 10**15)])
def test_a_micro_batch_that_no_machine_holds_is_refused_with_its_size(rows, length):
    with pytest.raises(
        LongrollError, match=rf"`batch_size` {rows} x `length` {length} takes at least .* GiB"
    ):
        memory.check_micro_batch(lm_of("mamba2"), rows, length)
    memory.check_micro_batch(lm_of("mamba2"), 2, 16)
