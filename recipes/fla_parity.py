"""Hold longroll's GLA, DeltaNet, Gated DeltaNet, RetNet, RWKV-6 and RWKV-7 to fla's own model classes.

For every configuration in `FAMILIES`: fla's class is given planted weights and saved, longroll loads the
folder, and both read the same tokens in one piece and in three, the second time from their own caches. On a
GPU fla runs its kernels (`--dtype bfloat16 --limit 5e-2`: its chunked delta rule takes no float32). On a CPU
it cannot, so they are replaced by torch functions: its own `naive_*` and `*_ref` where it has them
(recurrences, norms, rotary positions, RWKV-7's pieces), else what its docstrings say; layers, models, configs
and cache stay fla's. Of a GPU, recipes/fla_gpu.py asks the same in less time.

    python -m venv venv && venv/bin/pip install torch==2.13.0 triton==3.9.0 transformers==5.23.0 einops
    venv/bin/pip install --no-deps flash-linear-attention==0.6.0 fla-core==0.6.0
    PYTHONPATH=src:tests/families/fla_models venv/bin/python recipes/fla_parity.py

`--layouts tests/families/fla_models/layouts.json` writes what the tests hold ours to without fla: parameter
names and shapes, configs' defaults and, for planted weights, some of fla's logits.
"""

import argparse
import importlib
import json
import os
import tempfile
import warnings

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # fla compiles small activations
warnings.filterwarnings("ignore")

import fla  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from planted import plant, text  # noqa: E402
from torch import Tensor  # noqa: E402

import longroll  # noqa: E402
from longroll.families.fla_models import MODELS  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SMALL = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 256}
ATTENTION = {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "rope_theta": 500.0}
WINDOW = {"layers": [0], "num_heads": 4, "window_size": 9}
FAMILIES: dict[str, tuple[str, dict, list[dict]]] = {
    # model_type: (fla's class, the smallest configuration, what is changed in it)
    "gla": (
        "GLA",
        {"num_heads": 2},
        [
            {},
            {"num_heads": 4, "num_kv_heads": 2, "expand_k": 1.0, "expand_v": 2.0},
            {"use_short_conv": True, "conv_size": 3, "num_heads": 4, "num_kv_heads": 1},
            {"feature_map": "relu", "clamp_min": -0.04, "hidden_ratio": None},
            {"feature_map": "gelu", "fuse_norm": False, "elementwise_affine": False},
            {"use_output_gate": False, "intermediate_size": 80, "tie_word_embeddings": True},
            {"attn": ATTENTION},
            {"attn": [ATTENTION, WINDOW]},
        ],
    ),
    "delta_net": (
        "DeltaNet",
        {"num_heads": 2},
        [
            {},
            {"use_gate": True, "expand_k": 0.5, "expand_v": 2.0, "allow_neg_eigval": True},
            {"use_short_conv": False, "use_beta": False},
            {"qk_activation": "elu", "qk_norm": "sum", "conv_size": 2},
            {"qk_activation": "relu", "use_short_conv": False, "fuse_norm": False},
            {"qk_activation": "identity", "tie_word_embeddings": True, "attn": WINDOW},
        ],
    ),
    "gated_deltanet": (
        "GatedDeltaNet",
        {"num_heads": 2, "head_dim": 16},
        [
            {},
            {"num_v_heads": 4, "expand_v": 1.0, "allow_neg_eigval": True},
            {"output_gate_activation": "sigmoid"},
            {"use_gate": False, "conv_size": 3},
            {"use_short_conv": False, "fuse_norm": False, "attn": ATTENTION},
        ],
    ),
    "retnet": (
        "RetNet",
        {"num_heads": 2},
        [
            {},
            {"num_heads": 4, "num_kv_heads": 2, "expand_k": 0.5, "expand_v": 1.0},
            {"feature_map": "gelu", "use_output_gate": False, "use_short_conv": True},
            {"fuse_norm": False, "hidden_ratio": None, "attn": ATTENTION},
        ],
    ),
    "rwkv6": (
        "RWKV6",
        {"num_heads": 2},
        [
            {},
            {"expand_k": 1.0, "expand_v": 2.0, "proj_low_rank_dim": 8, "gate_low_rank_dim": 12},
            {"norm_first": False, "norm_bias": False, "fuse_norm": False, "hidden_ratio": None},
            {"hidden_act": "relu", "intermediate_size": 72, "attn": ATTENTION},
        ],
    ),
    "rwkv7": (
        "RWKV7",
        {"head_dim": 32},
        [
            {},
            {"head_dim": None, "num_heads": 4, "v_low_rank_dim": 8, "decay_low_rank_dim": None},
            {"norm_first": False, "norm_bias": False, "fuse_norm": False, "hidden_ratio": None},
            {"value_dim": 64, "gate_low_rank_dim": None, "tie_word_embeddings": True},
            {"hidden_act": "relu", "intermediate_size": 72, "a_low_rank_dim": None},
        ],
    ),
}


def cases(model_type: str) -> list[dict]:
    """The configurations of a family."""
    _, smallest, changes = FAMILIES[model_type]
    return [SMALL | smallest | change for change in changes]


def fla_class(model_type: str, what: str) -> type:
    """`GLAConfig`, `GLAForCausalLM` and so on, fla's."""
    return getattr(importlib.import_module("fla.models"), FAMILIES[model_type][0] + what)


def planted(model_type: str, config: dict) -> transformers.PreTrainedModel:
    """fla's model with planted weights."""
    model = fla_class(model_type, "ForCausalLM")(fla_class(model_type, "Config")(**config))
    plant(model)
    return model.eval()


def difference(actual: Tensor, expected: Tensor) -> float:
    """The largest one, relative to the largest number expected."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def compare(model_type: str, config: dict, device: str, dtype: torch.dtype) -> dict[str, float]:
    """Differences of the logits, of which `full`, `chunked` and `back` hold longroll to fla.

    `back` is fla again, on the folder that longroll saved; `fla_itself` is its chunked reading against its
    full one, and `past` the difference that the first half of the text makes to the second.
    """
    theirs = planted(model_type, config)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = longroll.load(folder, device=device, dtype=dtype)
    assert type(ours.model) is MODELS[model_type], type(ours.model)
    theirs = theirs.to(device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        ours.model.save_pretrained(folder)
        back = type(theirs).from_pretrained(folder, dtype=dtype).to(device).eval()
    tokens = text(SMALL["vocab_size"], 150).to(device)
    full = theirs(tokens, use_cache=True).logits
    cache, state, pieces, own = None, None, [], []
    for piece in tokens.split([70, 1, 79], dim=1):
        output = theirs(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
        logits, state = ours(piece, state)
        own.append(logits)
    chunked = torch.cat(pieces, dim=1)
    return {
        "full": difference(ours(tokens)[0], full),
        "chunked": difference(torch.cat(own, dim=1), chunked),
        "back": difference(back(tokens, use_cache=True).logits, full),
        "fla_itself": difference(chunked, full),
        "past": difference(ours(tokens[:, 70:])[0], full[:, 70:]),
    }


@torch.no_grad()
def layouts() -> dict:
    """fla's parameter names and shapes for every case, some logits, and the defaults of its configs."""
    table: dict = {"source": f"fla {fla.__version__}, by recipes/fla_parity.py", "defaults": {}, "cases": []}
    for model_type in FAMILIES:
        config_class = fla_class(model_type, "Config")
        defaults = config_class().to_dict()
        known = config_class.__init__.__code__.co_varnames
        table["defaults"][model_type] = {key: defaults[key] for key in known if key in defaults}
        for config in cases(model_type):
            model = planted(model_type, config)
            shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
            logits = model(text(config["vocab_size"], 100), use_cache=True).logits
            few = [float(f"{value:.7g}") for value in logits[:, [1, 50, 99], :4].flatten().tolist()]
            case = {"model_type": model_type, "config": config, "shapes": shapes, "logits": few}
            table["cases"].append(case)
    return table


# ---- fla on a CPU


def replace_kernels() -> None:
    """Put torch functions in the place of fla's Triton kernels."""
    norm = importlib.import_module("fla.modules.norm.layernorm")
    gated = importlib.import_module("fla.modules.norm.fused_norm_gate")
    conv = importlib.import_module("fla.modules.causal_conv1d.ops")
    mlp = importlib.import_module("fla.modules.mlp")
    activations = importlib.import_module("fla.modules.activations.ops")
    rotary = importlib.import_module("fla.modules.rotary.ops")
    names = ("gla", "delta_net", "gated_deltanet", "multiscale_retention", "rwkv6", "rwkv7")
    names += ("kda", "hgrn2", "gsa", "comba")
    layers = {name: importlib.import_module(f"fla.layers.{name}") for name in names}

    def normed(reference):
        def function(x, weight, bias, **kwargs):
            # the references need a weight
            weight = torch.ones(x.shape[-1], dtype=x.dtype) if weight is None else weight
            arguments = {k: v for k, v in kwargs.items() if k not in ("residual_in_fp32",)}
            return reference(x, weight, bias, **arguments)

        return function

    norm.rms_norm = normed(norm.rms_norm_ref)
    norm.layer_norm = normed(norm.layer_norm_ref)
    norm.group_norm = normed(norm.group_norm_ref)

    def rms_norm_gated(x, g, weight, bias, activation, eps, **_):
        gate = g.sigmoid() if activation == "sigmoid" else F.silu(g)
        return norm.rms_norm(x, weight, bias, eps=eps) * gate

    gated.rms_norm_gated = rms_norm_gated

    def causal_conv1d(
        x, weight, bias=None, activation=None, initial_state=None, output_final_state=False, **_
    ):
        width = weight.shape[-1]
        past = x.new_zeros(len(x), x.shape[-1], width) if initial_state is None else initial_state
        padded = torch.cat([past, x.mT], dim=-1)
        y = F.conv1d(padded[..., 1:], weight[:, None], bias, groups=len(weight)).mT
        final = padded[..., -width:] if output_final_state else None
        return (y if activation is None else F.silu(y)), final

    def convolve(self, x, cache=None, output_final_state=False, **_):
        weight = self.weight.squeeze(1)
        return causal_conv1d(x, weight, self.bias, self.activation, cache, output_final_state)

    conv.ShortConvolution.forward = convolve
    layers["gated_deltanet"].causal_conv1d = causal_conv1d

    mlp.SwiGLULinear.forward = lambda self, x, y, weight, bias: F.linear(F.silu(x) * y, weight, bias)
    mlp.swiglu = lambda x, y: F.silu(x) * y
    for name, function in {"sigmoid": torch.sigmoid, "logsigmoid": F.logsigmoid, "silu": F.silu}.items():
        activations.ACT2FN[name] = function
    activations.ACT2FN["swish"] = F.silu

    def rotary_embedding(x, cos, sin, interleaved=False, seqlen_offsets=0, **_):
        steps = slice(seqlen_offsets, seqlen_offsets + x.shape[1])
        return rotary.rotary_embedding_ref(x, cos[steps], sin[steps], interleaved)

    rotary.rotary_embedding = rotary_embedding

    def rms_norm_linear(x, weight, bias, linear_weight, linear_bias):
        return F.linear(norm.rms_norm(x, weight, bias, eps=1e-5), linear_weight, linear_bias)

    layers["hgrn2"].rms_norm_linear = layers["gsa"].rms_norm_linear = rms_norm_linear
    layers["hgrn2"].swish = importlib.import_module("fla.modules.feature_map").swish = F.silu

    replace_recurrences(layers)
    replace_native(layers)


def flash_attention(q, k, v, causal, window_size):
    """What `flash_attn_func` computes, q (B, T, H, D); flash-attn is no part of fla."""
    query, key = q.shape[1], k.shape[1]
    ahead = torch.arange(key, device=q.device) - torch.arange(key - query, key, device=q.device)[:, None]
    seen = ahead <= 0
    if window_size[0] >= 0:
        seen &= ahead >= -window_size[0]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True).transpose(1, 2)


def l2(x: Tensor) -> Tensor:
    """Unit vectors, as fla's kernels make them."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def turned(state: Tensor | None, v_first: bool = True) -> Tensor | None:
    """A V-first state K-first, and the other way round."""
    return state if state is None or not v_first else state.mT


def replace_native(layers: dict) -> None:
    """The recurrences of the families that run on fla's own classes, by fla's naive functions."""
    from fla.ops.comba.naive import naive_recurrent_comba
    from fla.ops.gsa.naive import naive_recurrent_gsa
    from fla.ops.kda.gate import naive_kda_gate
    from fla.ops.kda.naive import naive_recurrent_kda

    def kda(
        q, k, v, g, beta, A_log, dt_bias, initial_state, output_final_state, state_v_first, lower_bound, **_
    ):
        assert state_v_first and lower_bound is None
        g, beta = naive_kda_gate(g, A_log, dt_bias), beta.sigmoid()
        o, state = naive_recurrent_kda(
            l2(q), l2(k), v, g, beta, None, turned(initial_state), output_final_state
        )
        return o, turned(state)

    def comba(q, k, v, p, g, beta, initial_state, output_final_state, **_):
        return naive_recurrent_comba(l2(q), l2(k), v, l2(p), beta, g, None, initial_state, output_final_state)

    def gsa(q, k, v, s, g, initial_state, output_final_state, scale, **_):
        return naive_recurrent_gsa(q, k, v, s, g, scale, initial_state, output_final_state)

    layers["kda"].chunk_kda = layers["kda"].fused_recurrent_kda = kda
    layers["comba"].chunk_comba = layers["comba"].fused_recurrent_comba = comba
    layers["gsa"].chunk_gsa = layers["gsa"].fused_recurrent_gsa = gsa
    layers["hgrn2"].chunk_gla = layers["hgrn2"].fused_recurrent_gla = layers["gla"].chunk_gla


def replace_recurrences(layers: dict) -> None:
    """The recurrences of the six families, by fla's naive functions."""
    from fla.ops.delta_rule.naive import delta_rule_recurrence
    from fla.ops.gated_delta_rule.gate import naive_gdn_gate
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
    from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence
    from fla.ops.gla.naive import naive_recurrent_gla
    from fla.ops.rwkv6.recurrent_naive import naive_recurrent_rwkv6
    from fla.ops.rwkv7.fused_addcmul import torch_addcmul_rwkv7
    from fla.ops.rwkv7.fused_k_update import k_update_ref
    from fla.ops.rwkv7.gate_output_correction import gate_output_correction_ref
    from fla.ops.simple_gla.naive import naive_recurrent_simple_gla

    def gla(q, k, v, gk=None, g=None, initial_state=None, output_final_state=False, state_v_first=False, **_):
        initial = turned(initial_state, state_v_first)
        o, state = naive_recurrent_gla(q, k, v, g if gk is None else gk, initial, output_final_state)
        return o, turned(state, state_v_first)

    def retention(q, k, v, initial_state=None, output_final_state=False, **_):
        decay = (1 - 2.0 ** (-5.0 - torch.arange(q.shape[2], dtype=torch.float))).log()
        g = decay.expand(q.shape[:3])
        return naive_recurrent_simple_gla(q, k, v, g, None, initial_state, output_final_state)

    def head_first(function):
        def call(*tensors, **kwargs):
            o, state = function(*(t.transpose(1, 2) for t in tensors), **kwargs)
            return o.transpose(1, 2), state

        return call

    def delta(q, k, v, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel, **_):
        q, k = (l2(q), l2(k)) if use_qk_l2norm_in_kernel else (q, k)
        states = {"initial_state": initial_state, "output_final_state": output_final_state}
        return head_first(delta_rule_recurrence)(q, k, v, beta, **states)

    def gated_delta(
        q, k, v, g, beta, initial_state, output_final_state, allow_neg_eigval, A_log, dt_bias, **_
    ):
        beta = beta.sigmoid() * (2 if allow_neg_eigval else 1)
        q, k = (l2(t).repeat_interleave(v.shape[2] // q.shape[2], dim=2) for t in (q, k))
        g = naive_gdn_gate(g, A_log, dt_bias)
        o, state = naive_recurrent_gated_delta_rule(
            q, k, v, beta, g, None, turned(initial_state, True), output_final_state
        )
        return o, turned(state, True)

    def rwkv6(r, k, v, w, u, scale, initial_state, output_final_state, **_):
        heads = [t.transpose(1, 2) for t in (r, k, v, w)]
        o, state = naive_recurrent_rwkv6(*heads, u, scale, initial_state, output_final_state)
        return o.transpose(1, 2), state

    def rwkv7(r, w, k, v, a, b, scale, initial_state, output_final_state, **_):
        q = r * r.shape[-1] ** 0.5  # dplr_recurrence scales by itself
        states = {"initial_state": initial_state, "output_final_state": output_final_state}
        return head_first(dplr_recurrence)(q, k, v, a, b, w, **states)

    def rwkv7_fused(r, w, k, v, kk, a, **kwargs):
        return rwkv7(r, w, k, v, -kk, kk * a, **kwargs)

    def token_shift(x, cu_seqlens=None, cache=None, output_cache=False, **_):
        first = torch.zeros_like(x[:, :1]) if cache is None else cache.view(len(x), 1, -1)
        delta = torch.cat([first, x[:, :-1]], dim=1) - x
        return (delta, x[:, -1:]) if output_cache else delta

    layers["gla"].chunk_gla = layers["gla"].fused_recurrent_gla = gla
    for name in ("chunk_retention", "fused_recurrent_retention"):
        setattr(layers["multiscale_retention"], name, retention)
    for name in ("chunk_delta_rule", "fused_recurrent_delta_rule"):
        setattr(layers["delta_net"], name, delta)
    for name in ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"):
        setattr(layers["gated_deltanet"], name, gated_delta)
    layers["rwkv6"].chunk_rwkv6 = layers["rwkv6"].fused_recurrent_rwkv6 = rwkv6
    seven = layers["rwkv7"]
    seven.chunk_rwkv7, seven.fused_mul_recurrent_rwkv7, seven.l2_norm = rwkv7, rwkv7_fused, l2
    seven.fused_addcmul_rwkv7, seven.fused_k_rwkv7 = torch_addcmul_rwkv7, k_update_ref
    seven.gate_output_correction = gate_output_correction_ref
    for name in ("rwkv6", "rwkv7"):
        layers[name].token_shift = token_shift
        importlib.import_module(f"fla.models.{name}.modeling_{name}").token_shift = token_shift


def main() -> None:
    """Print a line a case; the exit status says whether all are within the limit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--limit", type=float, default=2e-5)
    parser.add_argument("--family", action="append", choices=FAMILIES)
    parser.add_argument("--layouts", help="write fla's parameter layouts to this file and stop")
    options = parser.parse_args()
    torch.set_num_threads(1)
    importlib.import_module("fla.layers.attn").flash_attn_func = flash_attention
    if options.device == "cpu":
        replace_kernels()
    if options.layouts:
        table = layouts()
        lines = [json.dumps(case) for case in table.pop("cases")]
        head = json.dumps(table, indent=1)[:-2]
        with open(options.layouts, "w") as file:
            file.write(head + ',\n "cases": [\n' + ",\n".join(lines) + "\n]\n}\n")
        return
    worst = 0.0
    for model_type in options.family or FAMILIES:
        for config in cases(model_type):
            changed = {key: value for key, value in config.items() if key not in SMALL}
            found = compare(model_type, config, options.device, getattr(torch, options.dtype))
            worst = max(worst, found["full"], found["chunked"], found["back"])
            print(model_type, changed, {name: f"{value:.1e}" for name, value in found.items()}, flush=True)
    print(f"worst {worst:.1e}, limit {options.limit:.0e}")
    raise SystemExit(worst > options.limit)


if __name__ == "__main__":
    main()
