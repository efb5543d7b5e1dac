"""Models whose layers lie on several devices: what a layer remembers stays with it."""

import pytest
import torch
from accelerate import dispatch_model

import longroll
from longroll.conformance import tiny
from longroll.families._spread import spread

NAMES = [
    "mamba",
    "mamba2",
    "bamba",
    "qwen3_next",
    "falcon_h1",
    "gla_hybrid",
    "rwkv",
    "xlstm",
    "recurrent_gemma",
]
GPUS = torch.cuda.device_count()


def _halves(model, devices) -> dict[str, object]:
    """A device map: layers in order, what is before them on the first device, what is after on the last."""
    names = [name for name, _ in model.named_modules()]
    (layers,) = {n for n in names if n.endswith((".layers", ".blocks")) and n.count(".") == 1}
    count = len(model.get_submodule(layers))
    place = {f"{layers}.{i}": devices[i * len(devices) // count] for i in range(count)}
    for name, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        if not name.startswith(f"{layers}."):
            part = name.rpartition(".")[0]
            place[part] = devices[0] if "embed" in part else devices[-1]
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if tied:
        head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
        place[head] = devices[0]
    return place


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("before", [True, False], ids=["placed first", "opened first"])
def test_hooks_of_accelerate_stay_around_our_forwards(name, before):
    """On one device each layer is a part of its own, whose inputs accelerate moves."""
    ids = torch.randint(tiny.VOCAB, (2, 30), generator=torch.Generator().manual_seed(1))
    expected, final = longroll.RecurrentLM(tiny.build(name))(ids)
    model = tiny.build(name)
    if not before:
        longroll.RecurrentLM(model)
    place = _halves(model, ["cpu"])
    dispatch_model(model, place, main_device="cpu", force_hooks=True)
    assert sum(hasattr(part, "_hf_hook") for part in model.modules()) >= len(place)
    lm = longroll.RecurrentLM(model)
    state, found = None, []
    for piece in ids.split([13, 1, 16], dim=1):
        hidden, state = lm(piece, state, logits=False)
        found.append(lm.head(hidden))
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-4, atol=1e-4)
    for key in final:
        torch.testing.assert_close(state[key], final[key], rtol=1e-4, atol=1e-4)


def test_load_places_a_checkpoint(tmp_path):
    tiny.build("bamba").save_pretrained(tmp_path)
    ids = torch.randint(tiny.VOCAB, (2, 30), generator=torch.Generator().manual_seed(1))
    expected, _ = longroll.load(tmp_path)(ids) if not GPUS else longroll.load(tmp_path, device="cpu")(ids)
    for given in (
        {"device_map": {"": "cpu"}},
        *([] if GPUS else [{"device_map": "auto"}, {"device": "auto"}]),
    ):
        lm = longroll.load(tmp_path, **given)
        assert {str(place) for place in lm.model.hf_device_map.values()} == {"cpu"}
        assert torch.equal(lm(ids)[0], expected)
    assert longroll.load("specimen", device="auto").model.hf_device_map


@pytest.mark.parametrize(
    "given", ["nowhere", {"model.layers.0": "cpu"}, {"": "cuda:97"}, {"": "disk"}], ids=str
)
def test_a_map_that_cannot_be_followed(given, tmp_path):
    tiny.build("bamba").save_pretrained(tmp_path)
    with pytest.raises(longroll.LongrollError, match="device"):
        longroll.load(tmp_path, device_map=given)


def test_a_map_beside_a_device(tmp_path, monkeypatch):
    with pytest.raises(longroll.LongrollError, match="`device` and `device_map`"):
        longroll.load("specimen", device="cpu", device_map="auto")
    launched = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(longroll.LongrollError, match="start one"):
        longroll.load("specimen", device="auto")


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_states_follow_their_layers(name):
    ids = torch.randint(tiny.VOCAB, (2, 300), generator=torch.Generator().manual_seed(1))
    expected = longroll.position_loss(longroll.RecurrentLM(tiny.build(name)), ids)
    model = tiny.build(name)
    place = _halves(model, [0, 1])
    dispatch_model(model, place)
    lm = longroll.RecurrentLM(model)
    lm.self_check()
    found = longroll.position_loss(lm, ids, chunk_size=64)
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-3, atol=1e-3)
    _, state = lm(ids.to(lm.device), logits=False)
    layers = {key.layer: t.device.index for key, t in state.items()}
    assert set(layers.values()) == {0, 1}
    for layer, device in layers.items():
        at = [d for part, d in place.items() if part.endswith(f".{layer}")]
        assert at == [device]
    longroll.diagnose(lm, ids[:, :257].repeat(2, 1), train_length=64)


def test_a_map_that_parts_one_tensor():
    """The head of a tied model is its embedding."""
    place = {"backbone": "cpu", "lm_head": "meta"}
    with pytest.raises(longroll.LongrollError, match=r"lm_head.weight are one tensor.*cpu and meta"):
        spread(tiny.build("mamba"), place)
