"""Faults of transformers that are worked around: a test fails when its fault is gone, and says what can go.

The models here are transformers' own, with its own cache: none goes through longroll unless it says so.
"""

import pytest
import torch
from transformers import DynamicCache

from longroll.conformance import laws
from longroll.families import family_of
from longroll.families._cache import StateCache
from longroll.model import RecurrentLM
from zoo import EVERY, build, lm_of, tokens


def stock(model, ids, cache=None, **options):
    """Logits and cache of transformers alone; a family's cache goes by its own name."""
    argument = family_of(model.config.model_type).cache_argument
    if cache is None:
        cache = DynamicCache(config=model.config)
    return model(ids, **{argument: cache}, **options).logits, cache


def chunked(model, ids, pieces):
    """Read piece by piece with transformers' cache."""
    logits, cache = [], None
    for piece in ids.split(pieces, dim=1):
        out, cache = stock(model, piece, cache)
        logits.append(out)
    return torch.cat(logits, dim=1)


def fault(stands, mend):
    assert stands, f"Fixed upstream: {mend}"


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "jamba", "zamba"])
@torch.no_grad()
def test_mamba1_forgets_its_state_where_several_tokens_come(name):
    model, ids = build(name), tokens(2, 40)
    gap = laws.gap(chunked(model, ids, [20, 20]), model(ids, use_cache=False).logits, "logits")
    fault(gap.size > 1e-3, "a GPU's selective_scan_fn may take the state too (families/_dispatch.py).")


@pytest.mark.parametrize("name", ["qwen3_5", "kimi_linear"])
def test_the_cache_overwrites_what_backward_needs(name):
    model, ids = build(name), tokens(2, 20)
    first, cache = stock(model, ids[:, :10])
    second, _ = stock(model, ids[:, 10:], cache)
    try:
        (first.sum() + second.sum()).backward()
    except RuntimeError as error:
        assert "inplace operation" in str(error)
    else:
        fault(False, "transformers' own cache may do in StateCache's place (families/_cache.py).")


@pytest.mark.parametrize("name", [name for name in EVERY if name.endswith("_recurrent")])
def test_a_cache_without_attention_raises(name):
    try:
        stock(build(name), tokens(2, 10))
    except ValueError as error:
        assert "LinearAttention layers" in str(error)
    else:
        fault(False, "StateCache.get_seq_length and get_mask_sizes.")


@pytest.mark.parametrize("name", ["bamba", "qwen3_5"])
@torch.no_grad()
def test_gradient_checkpointing_drops_the_cache(name):
    lm, ids = lm_of(name).train(), tokens(2, 10)
    state = laws.random_state(lm, 2)
    lm.model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in lm.model.modules():
        if hasattr(module, "_can_checkpoint_with_cache"):
            del module._can_checkpoint_with_cache
    with torch.enable_grad():
        dropped = torch.equal(lm(ids, state)[0], lm(ids)[0])
    fault(dropped, "the flag in Family.prepare (families/_family.py).")


@torch.no_grad()
def test_bamba_counts_positions_from_zero():
    model, ids = build("bamba"), tokens(2, 40)
    expected = model(ids, use_cache=False).logits
    gap = laws.gap(chunked(model, ids, [20, 20]), expected, "logits")
    fault(gap.size > 1e-3, "position_ids need not be explicit (Family.inputs in families/_family.py).")


@pytest.mark.parametrize("name", ["nemotron_h", "zamba2"])
@torch.no_grad()
def test_one_token_is_not_clamped_as_several_are(name):
    """`dt` has a least value on one path only: it counts where steps are small."""
    model, ids = build(name), tokens(2, 24)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("dt_bias"):
            parameter.sub_(9)
    _, cache = stock(model, ids[:, :8])
    expected, _ = stock(model, ids[:, 8:], cache)
    stepped = chunked(model, ids, [8] + [1] * 16)[:, 8:]
    gap = laws.gap(stepped, expected, "logits")
    fault(gap.size > 1e-4, "one token may go the one-token way (StateCache.get_conv_state).")
    assert laws.chunking(RecurrentLM(model), ids, [8] + [1] * 16).size < 2e-5


@torch.no_grad()
def test_recurrent_gemma_drops_its_convolution_and_its_state():
    model, ids = build("recurrent_gemma"), tokens(2, 40)
    gap = laws.gap(chunked(model, ids, [20, 20]), model(ids, use_cache=False).logits, "logits")
    fault(gap.size > 1e-3, "families/recurrent_gemma.py, if the state is no longer on the module.")
    gap = laws.gap(stock(model, ids, use_cache=True)[0], stock(model, ids, use_cache=True)[0], "logits")
    assert gap.size == 0  # position 0 forgets the module's state: else longroll's would enter twice


@torch.no_grad()
def test_rwkv_mixes_rows_where_one_token_comes():
    model, ids = build("rwkv"), tokens(2, 10)
    state = model(ids, use_cache=True).state
    logits = model(ids[:, :1], state=state).logits
    fault(logits.shape[:2] != (2, 1), "Rwkv4State.shift_shape (families/rwkv4.py).")


@torch.no_grad()
def test_rwkv_rescales_its_weights_in_place():
    model = build("rwkv", rescale_every=1)
    before = model.rwkv.blocks[1].attention.output.weight.clone()
    model(tokens(1, 4))
    moved = not torch.equal(model.rwkv.blocks[1].attention.output.weight, before)
    fault(moved, "keep_weights (families/rwkv4.py).")


def test_xlstm_overwrites_what_backward_needs():
    try:
        build("xlstm", hidden_size=128).train()(tokens(2, 20), use_cache=True).logits.sum().backward()
    except RuntimeError as error:
        assert "inplace operation" in str(error)
    else:
        fault(False, "transformers' own cache may do in XlstmState's place (families/xlstm.py).")


@torch.no_grad()
def test_xlstm_without_a_cache_fails_in_bfloat16():
    try:
        build("xlstm", dtype=torch.bfloat16)(tokens(1, 20), use_cache=False)
    except RuntimeError as error:
        assert "same dtype" in str(error)
    else:
        fault(False, "the dtype of XlstmState (families/xlstm.py).")


@torch.no_grad()
def test_experts_multiply_no_float64():
    model = build("jamba", dtype=torch.float64)
    model.set_experts_implementation("grouped_mm")
    try:
        model(tokens(1, 4), use_cache=False)
    except RuntimeError as error:
        assert "Double" in str(error)
    else:
        fault(False, "set_experts_implementation in conformance/tiny.py.")


@pytest.mark.parametrize("name", ["qwen3_5", "kimi_linear", "qwen4_exp"])
@torch.no_grad()
def test_kernels_are_bound_for_any_device(name):
    """With fla installed, transformers calls its Triton kernels on a CPU too."""
    pytest.importorskip("fla.ops", reason="shows only where fla is installed")
    import importlib

    model, ids = build(name), tokens(1, 8)
    module = importlib.import_module(type(model).__module__)
    functions = dict(vars(module))
    try:
        model(ids, use_cache=False)
    except RuntimeError as error:
        assert "active drivers" in str(error)
    else:
        fault(False, "torch_on_cpu (families/_dispatch.py).")
    RecurrentLM(model).self_check()
    vars(module).update(functions)


def test_a_state_that_is_read_is_a_copy():
    """Upstream's one-token paths write into what they read: StateCache hands out clones."""
    lm = lm_of("qwen3_5")
    state = laws.random_state(lm, 2)
    cache = StateCache(lm.model.config, state)
    assert cache.get_recurrent_state(0).data_ptr() != next(iter(state.values())).data_ptr()


@torch.no_grad()
def test_minimax_reads_on_token_by_token():
    model, ids = build("minimax"), tokens(1, 40)
    cache = model(ids[:, :10], use_cache=True).past_key_values
    with torch.profiler.profile() as profile:
        stock(model, ids[:, 10:], cache)
    products = sum(event.count for event in profile.key_averages() if event.key == "aten::matmul")
    fault(products > 30, "MiniMax's lightning attention may run as it is (families/minimax.py).")
