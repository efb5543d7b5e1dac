"""A linear recurrence of one's own, after a short convolution, its state a dict; it returns hidden states.

python examples/own_recurrence.py
longroll posttrain leaky --plugin examples.own_recurrence:build --intervention none --output base
longroll diagnose base --plugin examples.own_recurrence:build --length 1k
"""

import sys
import tempfile

import torch
from torch import nn
from torch.nn import functional as F

import longroll
from longroll.data import Corpus, long_sequences

TRAIN_LENGTH, TAIL = 32, 3


class Leaky(nn.Module):
    """h = a h + x in every channel: h grows over 1 / (1 - a) tokens, more than training may read."""

    def __init__(self, width: int = 96):
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.conv = nn.Conv1d(width, width, TAIL + 1, groups=width)
        self.decay = nn.Parameter(torch.linspace(0, 8, width))
        self.mix = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, 256)

    def forward(self, ids, state=None):  # state: h (B, width), and tail (B, width, TAIL), the last inputs
        x = self.embedding(ids).transpose(1, 2)
        if state is None:
            state = {"h": x.new_zeros(x.shape[:2]), "tail": x.new_zeros(*x.shape[:2], TAIL)}
        seen = torch.cat([state["tail"], x], dim=2)
        a, h, hs = self.decay.sigmoid(), state["h"], []
        for u in F.silu(self.conv(seen)).unbind(2):
            h = a * h + u
            hs.append(h)
        hidden = self.mix(torch.stack(hs, dim=1)) + x.transpose(1, 2)
        return hidden, {"h": h, "tail": seen[:, :, -TAIL:]}


def build(name: str) -> longroll.RecurrentLM:
    """What the command line's --plugin calls with the name of the model."""
    torch.manual_seed(0)
    module = Leaky()
    # print(lm) shows that a few forwards told `h`, which is recurrent, from `tail`, which is conv
    return longroll.wrap(module, head=module.head, vocab_size=256, train_length=TRAIN_LENGTH, name=name)


def main(folder: str) -> None:
    """Train from zero states, diagnose, post-train from passed states, diagnose again."""
    lm = build("leaky")
    text = Corpus.from_source("stdlib", max_tokens=300_000)
    tokens = long_sequences(Corpus.from_source("stdlib", split="validation"), 1024, 8)
    plain = longroll.PosttrainOptions(length=TRAIN_LENGTH, steps=150, learning_rate=5e-3)
    longroll.posttrain(lm, text, None, plain, f"{folder}/base")
    print("before:", longroll.diagnose(lm, tokens, explain=False).sentence)
    repair = longroll.PosttrainOptions(length=TRAIN_LENGTH, steps=100, learning_rate=2e-3)
    longroll.posttrain(lm, text, longroll.StatePassing(), repair, f"{folder}/repaired")
    after = longroll.load(f"{folder}/repaired", plugin=build)
    print("after: ", longroll.diagnose(after, tokens, explain=False).sentence)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
