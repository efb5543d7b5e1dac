"""An architecture of transformers that longroll does not know: `longroll.register_family` is one line.

    python examples/own_family.py out
    longroll diagnose out/base --plugin examples.own_family --length 1k

Its layers speak transformers' cache API for linear attention (`get_recurrent_state`,
`update_recurrent_state`), so `Family` needs the name of the recurrence and of the forward argument that takes
the cache.
"""

import sys
import tempfile

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

import longroll
from longroll.data import Corpus, long_sequences

TRAIN_LENGTH = 32


class LeakyConfig(PreTrainedConfig):
    """Sizes of the model."""

    model_type = "leaky"

    def __init__(self, vocab_size=256, hidden_size=96, num_hidden_layers=1, **kwargs):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.layer_types = ["linear_attention"] * num_hidden_layers
        super().__init__(**kwargs)


class LeakyLayer(nn.Module):
    """h = a h + x in every channel, from the state in the cache and back into it."""

    def __init__(self, config: LeakyConfig, layer_idx: int):
        super().__init__()
        self.layer_idx, width = layer_idx, config.hidden_size
        self.decay = nn.Parameter(torch.linspace(0, 8, width))
        self.mix = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x, cache=None):
        state = None if cache is None else cache.get_recurrent_state(self.layer_idx)
        h, a, hs = x.new_zeros(x.shape[::2]) if state is None else state, self.decay.sigmoid(), []
        for u in x.unbind(1):
            h = a * h + u
            hs.append(h)
        if cache is not None:
            cache.update_recurrent_state(h, self.layer_idx)
        return x + self.mix(torch.stack(hs, dim=1))


class LeakyModel(PreTrainedModel):
    """Hidden states of bytes."""

    config_class = LeakyConfig

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LeakyLayer(config, i) for i in range(config.num_hidden_layers))
        self.post_init()

    def _init_weights(self, module):
        """PyTorch's own are fine."""

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, cache_params=None, use_cache=None):
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x, cache_params)
        return BaseModelOutput(x)


class LeakyForCausalLM(PreTrainedModel):
    """The model and its head."""

    config_class, base_model_prefix, _init_weights = LeakyConfig, "backbone", LeakyModel._init_weights

    def __init__(self, config):
        super().__init__(config)
        self.backbone = LeakyModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, cache_params=None, use_cache=None):
        return CausalLMOutput(logits=self.lm_head(self.backbone(input_ids, cache_params).last_hidden_state))


AutoConfig.register("leaky", LeakyConfig, exist_ok=True)
AutoModelForCausalLM.register(LeakyConfig, LeakyForCausalLM, exist_ok=True)
longroll.register_family("leaky", longroll.Family("leaky", cache_argument="cache_params"))


def main(folder: str) -> None:
    """Train from zero states, diagnose, post-train from passed states, diagnose again."""
    torch.manual_seed(0)
    lm = longroll.RecurrentLM(LeakyForCausalLM(LeakyConfig()))
    text = Corpus.from_source("stdlib", max_tokens=300_000)
    tokens = long_sequences(Corpus.from_source("stdlib", split="validation"), 1024, 8)
    plain = longroll.PosttrainOptions(length=TRAIN_LENGTH, steps=150, learning_rate=5e-3)
    longroll.posttrain(lm, text, None, plain, f"{folder}/base")
    print("before:", longroll.diagnose(lm, tokens, explain=False).sentence)
    repair = longroll.PosttrainOptions(length=TRAIN_LENGTH, steps=100, learning_rate=2e-3)
    longroll.posttrain(lm, text, longroll.StatePassing(), repair, f"{folder}/repaired")
    after = longroll.load(f"{folder}/repaired")
    print("after: ", longroll.diagnose(after, tokens, explain=False).sentence)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
