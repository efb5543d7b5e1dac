"""BlinkDL's files and formulas, written anew: random `.pth` contents, and RWKV-7 and RWKV-6 token by token.

Sources: github.com/BlinkDL/RWKV-LM, `RWKV-v7/rwkv_v7_demo_rnn.py`, `RWKV-v5/rwkv_v6_demo.py` and its CUDA
kernel's recurrence. One row of text at a time, in the precision of the weights.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


@dataclass
class Sizes:
    vocab: int = 256
    layers: int = 2
    heads: int = 2
    head: int = 16
    ffn: int = 96
    rank: int = 8

    @property
    def hidden(self) -> int:
        return self.heads * self.head


def weights_7(s: Sizes, seed: int = 0) -> Weights:
    """A file of RWKV-7; like BlinkDL's, with v0, v1 and v2 of the first layer, which nothing reads."""
    draw = _Draw(seed)
    c = s.hidden
    w = _shell(s, draw)
    for layer in range(s.layers):
        att, ffn = f"blocks.{layer}.att.", f"blocks.{layer}.ffn."
        for name in "rwkvag":
            w[f"{att}x_{name}"] = draw.unit(1, 1, c)
        for i, name in enumerate("wav"):
            w[f"{att}{name}0"] = draw(1, 1, c)
            w[f"{att}{name}1"] = draw(c, s.rank + i, scale=0.3)
            w[f"{att}{name}2"] = draw(s.rank + i, c, scale=0.3)
        w[f"{att}g1"], w[f"{att}g2"] = draw(c, s.rank + 3, scale=0.3), draw(s.rank + 3, c, scale=0.5)
        w[f"{att}k_k"], w[f"{att}k_a"] = draw(1, 1, c), draw(1, 1, c)
        w[f"{att}r_k"] = draw(s.heads, s.head)
        for name in ("receptance", "key", "value", "output"):
            w[f"{att}{name}.weight"] = draw(c, c, scale=0.3)
        w[f"{ffn}x_k"] = draw.unit(1, 1, c)
        w[f"{ffn}key.weight"], w[f"{ffn}value.weight"] = draw(s.ffn, c, scale=0.3), draw(c, s.ffn, scale=0.1)
    return w


def weights_6(s: Sizes, seed: int = 0) -> Weights:
    """A file of RWKV-6."""
    draw = _Draw(seed)
    c = s.hidden
    w = _shell(s, draw)
    for layer in range(s.layers):
        att, ffn = f"blocks.{layer}.att.", f"blocks.{layer}.ffn."
        for name in "xwkvrg":
            w[f"{att}time_maa_{name}"] = draw.unit(1, 1, c)
        w[f"{att}time_maa_w1"] = draw(c, 5 * s.rank, scale=0.2)
        w[f"{att}time_maa_w2"] = draw(5, s.rank, c, scale=0.2)
        w[f"{att}time_decay"] = draw(1, 1, c) - 2
        w[f"{att}time_decay_w1"] = draw(c, s.rank + 1, scale=0.2)
        w[f"{att}time_decay_w2"] = draw(s.rank + 1, c, scale=0.2)
        w[f"{att}time_faaaa"] = draw(s.heads, s.head)
        for name in ("receptance", "key", "value", "output", "gate"):
            w[f"{att}{name}.weight"] = draw(c, c, scale=0.3)
        w[f"{ffn}time_maa_k"], w[f"{ffn}time_maa_r"] = draw.unit(1, 1, c), draw.unit(1, 1, c)
        w[f"{ffn}key.weight"], w[f"{ffn}value.weight"] = draw(s.ffn, c, scale=0.3), draw(c, s.ffn, scale=0.1)
        w[f"{ffn}receptance.weight"] = draw(c, c, scale=0.3)
    return w


class _Draw:
    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=self.generator) * scale

    def unit(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)


def _shell(s: Sizes, draw: _Draw) -> Weights:
    w = {"emb.weight": draw(s.vocab, s.hidden), "head.weight": draw(s.vocab, s.hidden, scale=0.3)}
    norms = ["ln_out", "blocks.0.ln0"]
    for layer in range(s.layers):
        norms += [f"blocks.{layer}.{norm}" for norm in ("ln1", "ln2", "att.ln_x")]
    for norm in norms:
        w[f"{norm}.weight"], w[f"{norm}.bias"] = 1 + draw(s.hidden, scale=0.3), draw(s.hidden, scale=0.3)
    return w


@torch.no_grad()
def read_7(w: Weights, tokens: Tensor) -> Tensor:
    """Logits (T, V) of RWKV-7 for one row of tokens (T,)."""
    w = {name: t.flatten() if t.ndim == 3 and len(t) == 1 else t for name, t in w.items()}
    heads, size = w["blocks.0.att.r_k"].shape
    layers = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
    zero = torch.zeros(heads * size, dtype=w["emb.weight"].dtype)
    states = [[zero, zero.new_zeros(heads, size, size), zero] for _ in range(layers)]  # (H, V, K) as there
    logits = []
    for token in tokens:
        x = _norm(w, "blocks.0.ln0", w["emb.weight"][token])
        v_first = None
        for layer, state in enumerate(states):
            block = f"blocks.{layer}."
            p = _part(w, block + "att.")
            now = _norm(w, block + "ln1", x)
            out, state[1], v_first = _time_mix_7(p, now, state[0], state[1], v_first)
            state[0] = now
            x = x + out
            now = _norm(w, block + "ln2", x)
            mixed = now + (state[2] - now) * w[block + "ffn.x_k"]
            state[2] = now
            inner = torch.relu(w[block + "ffn.key.weight"] @ mixed) ** 2
            x = x + w[block + "ffn.value.weight"] @ inner
        logits.append(w["head.weight"] @ _norm(w, "ln_out", x))
    return torch.stack(logits)


def _time_mix_7(p: Weights, x: Tensor, before: Tensor, state: Tensor, v_first: Tensor | None):
    heads, size = p["r_k"].shape
    xr, xw, xk, xv, xa, xg = (x + (before - x) * p[f"x_{name}"] for name in "rwkvag")
    r, k, v = p["receptance.weight"] @ xr, p["key.weight"] @ xk, p["value.weight"] @ xv
    if v_first is None:
        v_first = v
    else:
        v = v + (v_first - v) * torch.sigmoid(p["v0"] + (xv @ p["v1"]) @ p["v2"])
    a = torch.sigmoid(p["a0"] + (xa @ p["a1"]) @ p["a2"])
    g = torch.sigmoid(xg @ p["g1"]) @ p["g2"]
    w = -F.softplus(-(p["w0"] + torch.tanh(xw @ p["w1"]) @ p["w2"])) - 0.5
    w = torch.exp(-torch.exp(w))
    kk = F.normalize((k * p["k_k"]).view(heads, size), dim=-1)
    k = k * (1 + (a - 1) * p["k_a"])
    r, w, k, v, a = (t.view(heads, size) for t in (r, w, k, v, a))
    removed = -kk[:, :, None] @ (kk * a)[:, None, :]
    state = state * w[:, None, :] + state @ removed + v[:, :, None] @ k[:, None, :]
    out = _heads_norm(p, (state @ r[:, :, None]).flatten(), heads)
    out = out + ((r * k * p["r_k"]).sum(-1, keepdim=True) * v).flatten()
    return p["output.weight"] @ (out * g), state, v_first


@torch.no_grad()
def read_6(w: Weights, tokens: Tensor) -> Tensor:
    """Logits (T, V) of RWKV-6 for one row of tokens (T,)."""
    w = {name: t.flatten() if t.ndim == 3 and len(t) == 1 else t for name, t in w.items()}
    heads, size = w["blocks.0.att.time_faaaa"].shape
    layers = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
    zero = torch.zeros(heads * size, dtype=w["emb.weight"].dtype)
    states = [[zero, zero.new_zeros(heads, size, size), zero] for _ in range(layers)]  # (H, K, V)
    logits = []
    for token in tokens:
        x = _norm(w, "blocks.0.ln0", w["emb.weight"][token])
        for layer, state in enumerate(states):
            block = f"blocks.{layer}."
            p = _part(w, block + "att.")
            now = _norm(w, block + "ln1", x)
            out, state[1] = _time_mix_6(p, now, state[0], state[1])
            state[0] = now
            x = x + out
            now = _norm(w, block + "ln2", x)
            xk, xr = (now + (state[2] - now) * w[f"{block}ffn.time_maa_{name}"] for name in "kr")
            state[2] = now
            inner = torch.relu(w[block + "ffn.key.weight"] @ xk) ** 2
            gate = torch.sigmoid(w[block + "ffn.receptance.weight"] @ xr)
            x = x + gate * (w[block + "ffn.value.weight"] @ inner)
        logits.append(w["head.weight"] @ _norm(w, "ln_out", x))
    return torch.stack(logits)


def _time_mix_6(p: Weights, x: Tensor, before: Tensor, state: Tensor):
    heads, size = p["time_faaaa"].shape
    difference = before - x
    mixed = torch.tanh((x + difference * p["time_maa_x"]) @ p["time_maa_w1"]).view(5, 1, -1)
    mw, mk, mv, mr, mg = torch.bmm(mixed, p["time_maa_w2"]).squeeze(1)
    xw = x + difference * (p["time_maa_w"] + mw)
    xk = x + difference * (p["time_maa_k"] + mk)
    xv = x + difference * (p["time_maa_v"] + mv)
    xr = x + difference * (p["time_maa_r"] + mr)
    xg = x + difference * (p["time_maa_g"] + mg)
    r, k, v = p["receptance.weight"] @ xr, p["key.weight"] @ xk, p["value.weight"] @ xv
    g = F.silu(p["gate.weight"] @ xg)
    w = torch.exp(-torch.exp(p["time_decay"] + torch.tanh(xw @ p["time_decay_w1"]) @ p["time_decay_w2"]))
    r, k, v, w = (t.view(heads, size) for t in (r, k, v, w))
    now = k[:, :, None] @ v[:, None, :]
    out = (r[:, None, :] @ (p["time_faaaa"][:, :, None] * now + state)).flatten()
    state = now + w[:, :, None] * state
    return p["output.weight"] @ (_heads_norm(p, out, heads) * g), state


def _part(w: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): t for name, t in w.items() if name.startswith(prefix)}


def _norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape, w[f"{name}.weight"], w[f"{name}.bias"])


def _heads_norm(p: Weights, x: Tensor, heads: int) -> Tensor:
    return F.group_norm(x[None], heads, p["ln_x.weight"], p["ln_x.bias"], eps=64e-5)[0]
