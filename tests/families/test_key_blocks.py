"""Keys and values of hybrids are kept once, in blocks that are read where they lie."""

from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import longroll
from longroll import blocks
from longroll.conformance import tiny
from longroll.families.architectures import FAMILIES
from longroll.state import RecurrentState

IN_BLOCKS = sorted(
    name
    for name, (model_type, _) in tiny.CONFIGS.items()
    if model_type in FAMILIES and FAMILIES[model_type].blocks and "recurrent" not in name
)
JOINED = 5


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "JOINED", JOINED)


def _model(name: str, **config) -> longroll.RecurrentLM:
    return longroll.RecurrentLM(
        tiny.build(name, dtype=torch.float64, **tiny.every_expert(name), **config), name=name
    )


def _read(lm: longroll.RecurrentLM, ids: torch.Tensor, cuts: list[int]):
    state, hidden = None, []
    for start, stop in pairwise(cuts):
        piece, state = lm(ids[:, start:stop], state)
        hidden.append(piece)
    return torch.cat(hidden, dim=1), state


def _cuts(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [0, *sorted((torch.randperm(length - 1, generator=generator)[:6] + 1).tolist()), length]


@torch.no_grad()
@pytest.mark.parametrize("name", IN_BLOCKS)
def test_any_chunking_is_the_whole(name: str) -> None:
    lm, ids = _model(name), torch.randint(tiny.VOCAB, (2, 50), generator=torch.Generator().manual_seed(1))
    whole, expected = lm(ids)
    for seed in range(2):
        found, state = _read(lm, ids, _cuts(50, seed))
        torch.testing.assert_close(found, whole, rtol=1e-11, atol=1e-11)
        assert set(state) == set(expected)
        for key in state:
            torch.testing.assert_close(state[key], expected[key], rtol=1e-11, atol=1e-11)
    kept = [state.blocks(key) for key in state if key.part == "attention"]
    assert kept, "no keys"
    if FAMILIES[lm.model.config.model_type].blocks:
        assert any(len(each.pieces) > 1 for each in kept)


@pytest.mark.parametrize("name", ["bamba", "qwen3_next", "falcon_h1"])
def test_the_gradient_path_gives_the_same(name: str) -> None:
    lm, ids = _model(name), torch.randint(tiny.VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))
    cuts = _cuts(40, 0)
    found, state = _read(lm, ids, cuts)
    with torch.no_grad():
        expected, other = _read(lm, ids, cuts)
        going_on, _ = lm(ids[:, :9], state.detach())
        also, _ = lm(ids[:, :9], other)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(going_on, also, rtol=1e-11, atol=1e-11)


class _Largest(TorchDispatchMode):
    """The largest tensor that an operation made."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(made) if isinstance(t, torch.Tensor) and t._base is None]
        self.numbers = max(self.numbers, *sizes, 0)
        return made


@torch.no_grad()
@pytest.mark.parametrize("name", ["bamba", "nemotron_h", "qwen3_next", "lfm2", "llama"])
def test_a_forward_makes_nothing_that_grows_with_what_was_read(name: str) -> None:
    lm = longroll.RecurrentLM(tiny.build(name, **tiny.every_expert(name)))
    ids = torch.randint(tiny.VOCAB, (1, 330), generator=torch.Generator().manual_seed(1))
    _, state = lm(ids[:, :30])
    largest, places = [], []
    for start in range(30, 330, 30):
        with _Largest() as mode:
            _, after = lm(ids[:, start : start + 30], state, logits=False)
        largest.append(mode.numbers)
        before = [p.data_ptr() for key in state if key.part == "attention" for p in state.blocks(key).pieces]
        places.append(set(before))
        state = after
    assert largest[-1] == largest[1]
    kept = {p.data_ptr() for key in state if key.part == "attention" for p in state.blocks(key).pieces}
    assert all(place <= kept for place in places), "a block was copied"
    own = {
        p.untyped_storage().data_ptr(): p
        for k in state
        if k.part == "attention"
        for p in state.blocks(k).pieces
    }
    held = sum(p.untyped_storage().nbytes() for p in own.values())
    needed = sum(state[k].numel() * state[k].element_size() for k in state if k.part == "attention")
    assert held == needed


@torch.no_grad()
def test_one_token_at_a_time_makes_few_blocks() -> None:
    lm, ids = _model("bamba"), torch.randint(tiny.VOCAB, (1, 41), generator=torch.Generator().manual_seed(1))
    whole, _ = lm(ids)
    found, state = _read(lm, ids, list(range(42)))
    torch.testing.assert_close(found, whole, rtol=1e-10, atol=1e-10)
    for key in state:
        if key.part == "attention":
            assert len(state.blocks(key).pieces) <= 41 / JOINED + 1


@torch.no_grad()
def test_a_window_keeps_its_keys_only() -> None:
    window = 8
    lm = longroll.RecurrentLM(
        tiny.build(
            "qwen2", dtype=torch.float64, use_sliding_window=True, sliding_window=window, max_window_layers=1,
            layer_types=["full_attention", "sliding_attention"],
        )
    )  # fmt: skip
    ids = torch.randint(tiny.VOCAB, (2, 50), generator=torch.Generator().manual_seed(1))
    whole, _ = lm(ids)
    found, state = _read(lm, ids, _cuts(50, 0))
    torch.testing.assert_close(found, whole, rtol=1e-11, atol=1e-11)
    sizes = {key.layer: state[key].shape[-2] for key in state}
    assert sizes == {0: 50, 1: window - 1}
    kept = state[next(key for key in state if key.layer == 1)]
    assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()


@torch.no_grad()
def test_an_fla_hybrid_without_a_window() -> None:
    attention = {"layers": [1], "num_heads": 4, "num_kv_heads": 2}
    lm = _model("gla_hybrid", attn=attention)
    ids = torch.randint(tiny.VOCAB, (2, 50), generator=torch.Generator().manual_seed(1))
    whole, _ = lm(ids)
    found, state = _read(lm, ids, _cuts(50, 0))
    torch.testing.assert_close(found, whole, rtol=1e-10, atol=1e-10)
    assert any(len(state.blocks(key).pieces) > 1 for key in state if key.part == "attention")
    with torch.enable_grad():
        torch.testing.assert_close(lm(ids)[0].detach(), whole, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_a_state_in_blocks_is_a_state(tmp_path) -> None:
    lm, ids = _model("bamba"), torch.randint(tiny.VOCAB, (3, 40), generator=torch.Generator().manual_seed(1))
    _, state = _read(lm, ids, [0, 9, 20, 33])
    state.save(tmp_path / "state.safetensors")
    states = {
        "as it is": state,
        "loaded": RecurrentState.load(tmp_path / "state.safetensors"),
        "mapped": state.map(torch.clone),
        "stacked": state.map_stacked(torch.clone),
        "moved": state.detach().to("cpu"),
    }
    expected, _ = lm(ids[:, 33:], state)
    for way, given in states.items():
        assert (given.batch_size, given.seen) == (3, 33), way
        for key in state:
            assert torch.equal(given[key], state[key]), way
        torch.testing.assert_close(lm(ids[:, 33:], given)[0], expected, rtol=1e-12, atol=1e-12, msg=way)
    some = [2, 0]
    found, _ = lm(ids[some, 33:], state.rows(some))
    torch.testing.assert_close(found, expected[some], rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast(dtype: torch.dtype) -> None:
    lm = longroll.RecurrentLM(tiny.build("bamba", dtype=dtype))
    ids = torch.randint(tiny.VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))
    exact, _ = longroll.RecurrentLM(tiny.build("bamba"))(ids)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = _read(lm, ids, [0, 9, 20, 40])
        whole, _ = lm(ids)
    chunked, at_once = ((t.float() - exact).norm() / exact.norm() for t in (found, whole))
    assert chunked < 2 * at_once + 1e-3


@torch.no_grad()
def test_a_model_by_itself_computes_as_before() -> None:
    ids = torch.randint(tiny.VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))
    model = tiny.build("bamba")
    expected = model(ids, use_cache=False).logits
    longroll.RecurrentLM(model)
    assert torch.equal(model(ids, use_cache=False).logits, expected)


@torch.no_grad()
def test_eager_attention_stays_eager() -> None:
    ids = torch.randint(tiny.VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))
    model = tiny.build("bamba", dtype=torch.float64)
    model.set_attn_implementation("eager")
    lm = longroll.RecurrentLM(model)
    whole, _ = lm(ids)
    found, _ = _read(lm, ids, [0, 9, 20, 40])
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)  # its softmax is in float32
