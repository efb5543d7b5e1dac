"""Modules of one's own, small: a recurrence with a short convolution, its state in every layout."""

import torch
from torch import nn

VOCAB, WIDTH, TAIL = 29, 6, 3


class Recurrence(nn.Module):
    """Two layers: a causal convolution of width TAIL + 1, then h = a h + (1 - a) x.

    `layout` says how the state goes out: dict, nested tuple, list of layers, or one tensor (then without the
    convolution), batch first or second.
    """

    def __init__(self, layout="dict", layers=2, head=True, vocab=VOCAB):
        super().__init__()
        self.layout, self.layers = layout, layers
        self.embedding = nn.Embedding(vocab, WIDTH)
        self.conv = nn.ParameterList(torch.randn(TAIL + 1, WIDTH) for _ in range(layers))
        self.decay = nn.Parameter(torch.randn(layers, WIDTH))
        self.mix = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        self.out = nn.Linear(WIDTH, vocab)
        self.returns_logits = head

    def unpack(self, state, rows):
        """Hidden states and tails of each layer, (B, D) and (B, TAIL, D)."""
        if state is None:
            zero = self.decay.new_zeros
            return [(zero(rows, WIDTH), zero(rows, TAIL, WIDTH)) for _ in range(self.layers)]
        if self.layout == "dict":
            return list(zip(state["h"], state["tails"], strict=True))
        if self.layout == "tuple":
            return [tuple(layer) for layer in state]
        if self.layout == "stacked":
            return list(zip(state[0], state[1].unbind(2), strict=True))
        return [(h, h.new_zeros(rows, TAIL, WIDTH)) for h in state.unbind(1)]

    def pack(self, pairs):
        hs, tails = zip(*pairs, strict=True)
        if self.layout == "dict":
            return {"h": list(hs), "tails": list(tails)}
        if self.layout == "tuple":
            return tuple(pairs)
        if self.layout == "stacked":  # batch axes 1 and 0
            return torch.stack(hs), torch.stack(tails, dim=2)
        return torch.stack(hs, dim=1)

    def forward(self, ids, state=None):
        x, ends = self.embedding(ids), []
        for i, (h, tail) in enumerate(self.unpack(state, len(ids))):
            if self.layout != "tensor":
                seen = torch.cat([tail, x], dim=1)
                tail = seen[:, -TAIL:]
                x = sum(seen[:, j : j + x.shape[1]] * w for j, w in enumerate(self.conv[i]))
            a, hs = self.decay[i].sigmoid(), []
            for t in x.unbind(1):
                h = a * h + (1 - a) * t
                hs.append(h)
            x = x + self.mix[i](torch.stack(hs, dim=1)).tanh()
            ends.append((h, tail))
        return (self.out(x) if self.returns_logits else x), self.pack(ends)


class RNN(nn.Module):
    """nn.GRU or nn.LSTM, whose batch axis is 1, with tied embeddings."""

    def __init__(self, kind=nn.GRU, layers=2, vocab=VOCAB):
        super().__init__()
        self.embedding = nn.Embedding(vocab, WIDTH)
        self.rnn = kind(WIDTH, WIDTH, layers, batch_first=True)
        self.out = nn.Linear(WIDTH, vocab, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, ids, state=None):
        hidden, state = self.rnn(self.embedding(ids), state)
        return self.out(hidden), state


def build(name):
    """What `plugin="own_modules:build"` gives: modules by name."""
    torch.manual_seed(0)
    if name == "broken":
        raise ValueError("no weights\nhere")
    if name == "list":
        return [1]
    return RNN(nn.LSTM if name == "lstm" else nn.GRU) if name in ("gru", "lstm") else Recurrence(name)
