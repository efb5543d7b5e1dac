"""What longroll put into a model stays there under accelerate's hooks, whichever came first."""

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules

from longroll import LongrollError, RecurrentLM
from longroll.conformance import laws
from zoo import assert_close, build, lm_of, tokens


@pytest.mark.parametrize("first", ["hooks", "longroll"])
@pytest.mark.parametrize("name", ["mamba", "mamba2", "jamba", "recurrent_gemma", "minimax", "xlstm", "rwkv7"])
def test_a_device_map_changes_nothing(name, first, tmp_path):
    model = build(name)
    if first == "longroll":
        RecurrentLM(model)
    hooked = accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    lm = RecurrentLM(hooked)
    text, start = tokens(2, 31), laws.random_state(lm_of(name), 2)
    with torch.no_grad():
        logits, _ = lm(text, start)
        expected, _ = lm_of(name)(text, start)
    assert_close(logits, expected, 1e-6)
    assert laws.chunking(lm, text, [17, 1, 11, 2], start).size < 1e-4
    placed = [m for m in model.modules() if "_longroll" in repr(vars(m).get("_old_forward", ""))]
    assert placed or name not in ("mamba", "mamba2")
    remove_hook_from_submodules(hooked)
    with torch.no_grad():
        assert_close(RecurrentLM(hooked)(text, start)[0], expected, 1e-6)


def test_offloaded_weights_are_refused():
    model = accelerate.cpu_offload(build("mamba2"), execution_device="cpu")
    with pytest.raises(LongrollError, match="offloaded"):
        RecurrentLM(model)
