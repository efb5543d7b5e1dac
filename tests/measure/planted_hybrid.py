"""Tiny hybrids whose attention, or some of whose recurrent heads, go wrong past T, and texts of a sound twin.

The texts of the twin are natural to it. Where it reads with an attention window of T tokens, the same weights
that read all keys are a model whose attention leaves its training range; one with a head that hardly forgets
is one whose state does.
"""

import functools

import torch
from torch import Tensor

import zoo
from longroll.measure._attention_readings import Window
from longroll.model import RecurrentLM

TRAIN_LENGTH, STRIDE = 16, 4


def twin_lm(
    *, state: bool = False, attention: bool = False, shape: str = "bamba", seed: int = 0
) -> RecurrentLM:
    """A model with sharp logits; `state`: states of heads grow without end; `attention`: it counts more."""
    lm = zoo.lm_of(shape, seed=seed)
    with torch.no_grad():
        lm.model.get_output_embeddings().weight.mul_(8)
        for name, weight in lm.model.named_parameters():
            if "self_attn.o_proj" in name:
                weight.mul_(6 if attention else 1)
            if "self_attn.q_proj" in name:
                weight.mul_(3 if attention else 1)
        if state:
            mixer = lm.model.model.layers[2].mamba
            mixer.A_log[:] = -14.0
            mixer.dt_bias[:] = 0.0
    return lm


@functools.cache
@torch.no_grad()
def texts(attention: bool, shape: str = "bamba", seed: int = 0, rows: int = 6, length: int = 160) -> Tensor:
    """Texts (rows, length + 1) of the twin; it reads with a window of T where attention is to go wrong."""
    lm = twin_lm(attention=attention, shape=shape, seed=seed)
    hold = Window(TRAIN_LENGTH - 1 if attention else length)
    generator = torch.Generator().manual_seed(seed)
    token = torch.randint(zoo.VOCAB, (rows, 1), generator=generator)
    text, state = [token], None
    for position in range(length):
        logits, state = lm(token, state if state is None else hold(position, state))
        token = torch.multinomial(logits[:, -1].softmax(-1), 1, generator=generator)
        text.append(token)
    return torch.cat(text, dim=1)
