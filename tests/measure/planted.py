"""A tiny Mamba-2 in which one head hardly forgets, and texts that its healthy twin finds natural."""

import functools

import torch
from torch import Tensor

import zoo
from longroll.measure._coverage import Head
from longroll.model import RecurrentLM

TRAIN_LENGTH = 16
PLANTED = Head(1, 2)


@functools.cache
def twin_lm() -> RecurrentLM:
    """Random weights, with logits sharp enough that a text has a likely next token."""
    lm = zoo.lm_of("mamba2")
    with torch.no_grad():
        lm.model.get_output_embeddings().weight.mul_(3)
    return lm


@functools.cache
def planted_lm() -> RecurrentLM:
    """The twin, but the state of one head grows without end: its A is about zero."""
    lm = zoo.lm_of("mamba2")
    lm.model.load_state_dict(twin_lm().model.state_dict())
    mixer = lm.model.backbone.layers[PLANTED.layer].mixer
    with torch.no_grad():
        mixer.A_log[PLANTED.head] = -14.0
        mixer.dt_bias[PLANTED.head] = 0.0
    return lm


@functools.cache
@torch.no_grad()
def texts_of_twin(rows: int = 8, length: int = 384) -> Tensor:
    """Texts (rows, length + 1) sampled from the twin; other rows are other texts."""
    generator = torch.Generator().manual_seed(0)
    token = torch.randint(zoo.VOCAB, (rows, 1), generator=generator)
    text, state = [token], None
    for _ in range(length):
        logits, state = twin_lm()(token, state)
        token = torch.multinomial(logits[:, -1].softmax(-1), 1, generator=generator)
        text.append(token)
    return torch.cat(text, dim=1)
