"""A GRU of one's own: `longroll.wrap` needs nothing but a forward that takes and gives the state.

python examples/own_gru.py
longroll posttrain gru --plugin examples.own_gru:build --intervention none --output base
longroll diagnose base --plugin examples.own_gru:build --length 1k
"""

import sys
import tempfile

import torch
from torch import nn

import longroll
from longroll.data import Corpus, long_sequences

TRAIN_LENGTH = 32


class GRU(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, width: int = 96):
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.rnn = nn.GRU(width, width, batch_first=True)
        self.out = nn.Linear(width, 256)

    def forward(self, ids, state=None):  # ids (B, T), state (1, B, width); None is zero
        hidden, state = self.rnn(self.embedding(ids), state)
        return self.out(hidden), state


def build(name: str) -> longroll.RecurrentLM:
    """What the command line's --plugin calls with the name of the model."""
    torch.manual_seed(0)
    return longroll.wrap(GRU(), vocab_size=256, train_length=TRAIN_LENGTH, name=name)


def main(folder: str) -> None:
    """Train from zero states, diagnose, post-train from passed states, diagnose again."""
    lm = build("gru")
    text = Corpus.from_source("stdlib", max_tokens=300_000)
    tokens = long_sequences(Corpus.from_source("stdlib", split="validation"), 1024, 8)
    plain = longroll.PosttrainOptions(length=TRAIN_LENGTH, steps=100, learning_rate=5e-3)
    longroll.posttrain(lm, text, None, plain, f"{folder}/base")
    print("before:", longroll.diagnose(lm, tokens, explain=False).sentence)
    repair = longroll.PosttrainOptions(length=TRAIN_LENGTH, steps=40, learning_rate=2e-3)
    longroll.posttrain(lm, text, longroll.StatePassing(), repair, f"{folder}/repaired")
    after = longroll.load(f"{folder}/repaired", plugin=build)
    print("after: ", longroll.diagnose(after, tokens, explain=False).sentence)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
