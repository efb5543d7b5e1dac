"""Original state-spaces checkpoints, held to a float64 forward of the original architecture."""

import json
import os
import pickle

import pytest
import torch
import torch.nn.functional as F

import longroll
from longroll import LongrollError
from longroll.ops.reference import selective_scan_reference, short_conv_reference, ssd_reference
from zoo import assert_close, tokens

D_MODEL, LAYERS, VOCAB = 32, 2, 60  # padded to 64
COMMON = {
    "d_model": D_MODEL,
    "n_layer": LAYERS,
    "vocab_size": VOCAB,
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 16,
}
SSM = {
    "mamba1": {},  # as state-spaces/mamba-130m: no ssm_cfg entries at all
    "mamba1_sized": {"layer": "Mamba1", "d_state": 8, "d_conv": 3, "expand": 3, "dt_rank": 5},
    "mamba2": {"layer": "Mamba2", "headdim": 16},  # d_state 128
    "mamba2_groups": {"layer": "Mamba2", "headdim": 16, "d_state": 12, "ngroups": 2, "d_conv": 3},
}


def sizes(ssm):
    """d_inner, d_state, d_conv, dt_rank, headdim, ngroups with the original defaults."""
    second = ssm.get("layer") == "Mamba2"
    return (
        ssm.get("expand", 2) * D_MODEL,
        ssm.get("d_state", 128 if second else 16),
        ssm.get("d_conv", 4),
        ssm.get("dt_rank", -(-D_MODEL // 16)),
        ssm.get("headdim", 64),
        ssm.get("ngroups", 1),
    )


def make_weights(ssm, *, tied: bool, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under the names that mamba_ssm's MambaLMHeadModel saves."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape, scale=0.3):
        return torch.randn(*shape, generator=generator) * scale

    d_inner, d_state, d_conv, dt_rank, headdim, ngroups = sizes(ssm)
    weights = {"backbone.embedding.weight": rand(64, D_MODEL, scale=1.0)}
    for n in range(LAYERS):
        mixer = f"backbone.layers.{n}.mixer."
        if ssm.get("layer") == "Mamba2":
            heads = d_inner // headdim
            channels = d_inner + 2 * ngroups * d_state
            layer = {
                "dt_bias": rand(heads) - 2,
                "A_log": rand(heads).abs() - 1,
                "D": rand(heads) + 1,
                "in_proj.weight": rand(2 * d_inner + 2 * ngroups * d_state + heads, D_MODEL),
                "norm.weight": rand(d_inner) + 1,
            }
        else:
            channels = d_inner
            layer = {
                "A_log": rand(d_inner, d_state).abs() - 1,
                "D": rand(d_inner) + 1,
                "in_proj.weight": rand(2 * d_inner, D_MODEL),
                "x_proj.weight": rand(dt_rank + 2 * d_state, d_inner),
                "dt_proj.weight": rand(d_inner, dt_rank),
                "dt_proj.bias": rand(d_inner) - 2,
            }
        layer |= {
            "conv1d.weight": rand(channels, 1, d_conv, scale=0.5),
            "conv1d.bias": rand(channels),
            "out_proj.weight": rand(D_MODEL, d_inner),
        }
        weights |= {mixer + name: tensor for name, tensor in layer.items()}
        weights[f"backbone.layers.{n}.norm.weight"] = rand(D_MODEL) + 1
    weights["backbone.norm_f.weight"] = rand(D_MODEL) + 1
    tied_head = weights["backbone.embedding.weight"]
    weights["lm_head.weight"] = tied_head if tied else rand(64, D_MODEL)
    return weights


def write(folder, ssm, *, tied=True, weights=None, **config):
    entries = COMMON | {"tie_embeddings": tied} | ({"ssm_cfg": ssm} if ssm else {"ssm_cfg": {}}) | config
    (folder / "config.json").write_text(json.dumps(entries))
    weights = make_weights(ssm, tied=tied) if weights is None else weights
    torch.save(weights, folder / "pytorch_model.bin")
    return weights


def rms_norm(x, weight, groups=1):
    parts = x.unflatten(-1, (groups, -1))
    return (parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + 1e-5)).flatten(-2) * weight


def mixer1(x, p, ssm):
    d_inner, d_state, _, dt_rank, _, _ = sizes(ssm)
    x, z = (x @ p["in_proj.weight"].T).split(d_inner, dim=-1)
    x, _ = short_conv_reference(x, p["conv1d.weight"][:, 0], p["conv1d.bias"], "silu")
    dt, B, C = (x @ p["x_proj.weight"].T).split([dt_rank, d_state, d_state], dim=-1)
    dt = dt @ p["dt_proj.weight"].T
    A = -p["A_log"].exp()
    y, _ = selective_scan_reference(x, dt, A, B, C, p["D"], z, p["dt_proj.bias"], True)
    return y @ p["out_proj.weight"].T


def mixer2(x, p, ssm):
    d_inner, d_state, _, _, headdim, ngroups = sizes(ssm)
    heads = d_inner // headdim
    group = ngroups * d_state
    z, xBC, dt = (x @ p["in_proj.weight"].T).split([d_inner, d_inner + 2 * group, heads], dim=-1)
    xBC, _ = short_conv_reference(xBC, p["conv1d.weight"][:, 0], p["conv1d.bias"], "silu")
    x, B, C = xBC.split([d_inner, group, group], dim=-1)
    x = x.unflatten(-1, (heads, headdim))
    B, C = (t.unflatten(-1, (ngroups, d_state)) for t in (B, C))
    y, _ = ssd_reference(x, dt, -p["A_log"].exp(), B, C, p["D"], None, p["dt_bias"], True)
    y = rms_norm(y.flatten(-2) * F.silu(z), p["norm.weight"], ngroups)  # norm_before_gate=False
    return y @ p["out_proj.weight"].T


def forward(weights, ssm, ids):
    """Logits in float64 of mixer_seq_simple.MambaLMHeadModel."""
    weights = {name: tensor.double() for name, tensor in weights.items()}
    mixer = mixer2 if ssm.get("layer") == "Mamba2" else mixer1
    residual = weights["backbone.embedding.weight"][ids]
    for n in range(LAYERS):
        prefix = f"backbone.layers.{n}.mixer."
        p = {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
        residual = residual + mixer(rms_norm(residual, weights[f"backbone.layers.{n}.norm.weight"]), p, ssm)
    return rms_norm(residual, weights["backbone.norm_f.weight"]) @ weights["lm_head.weight"].T


@pytest.mark.parametrize("kind", SSM)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@torch.no_grad()
def test_logits_are_the_original_architectures(kind, tied, tmp_path):
    weights = write(tmp_path, SSM[kind], tied=tied)
    lm = longroll.load(tmp_path, device="cpu")
    ids = tokens(2, 40)
    expected = forward(weights, SSM[kind], ids)
    logits, state = lm(ids)
    assert_close(logits.double(), expected, 2e-5)
    first, state = lm(ids[:, :23])
    second, _ = lm(ids[:, 23:], state)
    assert_close(torch.cat([first, second], 1).double(), expected, 2e-5)
    assert lm.vocab_size == 64 and not lm.training
    assert lm.train_length is None


def test_the_dtype_is_the_checkpoints_with_auto(tmp_path):
    weights = {name: tensor.bfloat16() for name, tensor in make_weights(SSM["mamba2"], tied=True).items()}
    write(tmp_path, SSM["mamba2"], weights=weights)
    assert longroll.load(tmp_path, device="cpu", dtype="auto").model.dtype == torch.bfloat16
    assert longroll.load(tmp_path, device="cpu").model.dtype == torch.float32


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    weights = make_weights({}, tied=True)
    planted = tmp_path / "planted"
    write(tmp_path, {}, weights=weights | {"extra": Code(str(planted))})
    with pytest.raises(LongrollError, match=r"pytorch_model\.bin"):
        longroll.load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Code(str(planted))))
    with pytest.raises(LongrollError, match=r"pytorch_model\.bin"):
        longroll.load(tmp_path)
    assert not planted.exists()


@pytest.mark.parametrize(
    "missing", ["backbone.layers.1.mixer.D", "backbone.embedding.weight", "backbone.norm_f.weight"]
)
def test_missing_weights_are_named(missing, tmp_path):
    weights = make_weights({}, tied=True)
    del weights[missing]
    write(tmp_path, {}, weights=weights)
    with pytest.raises(LongrollError, match=missing.replace("embedding.", "embeddings.")):
        longroll.load(tmp_path)


def test_an_untied_checkpoint_without_its_head_is_refused(tmp_path):
    weights = make_weights({}, tied=False)
    del weights["lm_head.weight"]
    write(tmp_path, {}, tied=False, weights=weights)
    with pytest.raises(LongrollError, match=r"lm_head\.weight"):
        longroll.load(tmp_path)


def test_weights_of_another_size_are_refused(tmp_path):
    write(tmp_path, {}, weights=make_weights({"d_state": 8}, tied=True))
    with pytest.raises(LongrollError, match=r"pytorch_model\.bin does not fit its config\.json"):
        longroll.load(tmp_path)


def test_a_missing_and_a_truncated_file_are_refused(tmp_path):
    write(tmp_path, {})
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(LongrollError, match=r"pytorch_model\.bin"):
        longroll.load(tmp_path)
    file.unlink()
    with pytest.raises(LongrollError, match=r"no pytorch_model\.bin"):
        longroll.load(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"attn_layer_idx": [1], "attn_cfg": {"num_heads": 4}}, "attention and MLP layers"),
        ({"d_intermediate": 64}, "attention and MLP layers"),
        ({"rms_norm": False}, "rms_norm"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "Mamba3"),
        ({"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, "norm_before_gate"),
        ({"ssm_cfg": {"layer": "Mamba2", "dt_limit": [0.0, 0.1]}}, "dt_limit"),
    ],
)
def test_what_has_no_counterpart_is_refused(config, message, tmp_path):
    write(tmp_path, {}, **config)
    with pytest.raises(LongrollError, match=message):
        longroll.load(tmp_path)


HUGE = 10**7


@pytest.mark.parametrize(
    ("config", "entry"),
    [
        ({"d_model": HUGE}, "d_model is 10000000 there and 32 in the file"),
        ({"n_layer": HUGE}, "n_layer is 10000000 there and 2 in the file"),
        ({"d_model": 2.5}, "d_model must be a whole number"),
        ({"n_layer": True}, "n_layer must be a whole number"),
        ({"n_layer": 0}, "n_layer must be a whole number"),
        ({"d_model": "32"}, "d_model must be a whole number"),
        ({"ssm_cfg": ["Mamba2"]}, "ssm_cfg must be an object"),
        ({"ssm_cfg": {"layer": ["Mamba2"]}}, "known are"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 0}}, "headdim must be a whole number"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 24}}, "headdim 24 does not divide"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 16, "d_state": HUGE}}, "by the config"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 16, "ngroups": -1}}, "ngroups must be a whole number"),
        ({"ssm_cfg": {"layer": "Mamba1", "d_state": 2**62}}, "no model has this config|by the config"),
        ({"ssm_cfg": {"layer": "Mamba1", "expand": HUGE}}, "by the config"),
        ({"ssm_cfg": {"layer": "Mamba1", "dt_rank": HUGE}}, "by the config"),
        ({"ssm_cfg": {"layer": "Mamba1", "d_conv": None}}, "d_conv must be a whole number"),
    ],
)
def test_odd_sizes_are_refused_before_memory_is_taken(config, entry, tmp_path):
    layer = (config.get("ssm_cfg") or {}).get("layer") if isinstance(config.get("ssm_cfg"), dict) else None
    kind = "mamba2" if layer == "Mamba2" else "mamba1"
    write(tmp_path, SSM[kind], **config)
    with pytest.raises(LongrollError, match=entry) as caught:
        longroll.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_settings_of_the_initialisation_change_nothing(tmp_path):
    ssm = SSM["mamba1_sized"]
    weights = write(tmp_path, ssm, ssm_cfg=ssm | {"dt_min": 0.01, "dt_scale": 2.0, "use_fast_path": False})
    ids = tokens(1, 9)
    with torch.no_grad():
        assert_close(longroll.load(tmp_path)(ids)[0].double(), forward(weights, ssm, ids), 2e-5)
