"""Whether documents that share a row see each other: in longroll's forward, and in the model's own."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening

from longroll.errors import LongrollError
from longroll.model import RecurrentLM

LENGTHS = (24, 17)
"""Tokens of the first and the second document."""
ROUNDING = 1e-3
"""Largest change, relative to the largest logit, that is taken for rounding; 16-bit weights get 5e-2."""


@dataclass(frozen=True)
class Packing:
    """How far the logits of the second document move when the first is replaced, relative to the largest."""

    longroll: float | None
    """In `RecurrentLM` with `starts`; None: longroll does not open the model."""
    own: float | None
    """In the model's own forward of a padding-free batch of transformers' `DataCollatorWithFlattening`
    (`position_ids`, `cu_seq_lens_*` and `seq_idx`); None: it fails on such a batch."""
    own_error: str
    """Why the model's own forward fails; empty where it does not."""
    limit: float
    """Largest difference that counts as rounding."""

    @property
    def sentences(self) -> list[str]:
        """The findings, a sentence each."""
        ours, own = "longroll's forward with `starts`", "The model's own forward of a padding-free batch"
        return [
            _sentence(ours, self.longroll, self.limit, "does not open the model"),
            _sentence(own, self.own, self.limit, self.own_error),
        ]

    def to_json(self) -> dict[str, Any]:
        """Return plain data for results."""
        return {"kind": "packing", **asdict(self), "sentences": self.sentences}


def _sentence(who: str, change: float | None, limit: float, failure: str) -> str:
    if change is None:
        return f"{who} {failure}."
    moved = f"the second one's logits change by {change:.0e} of the largest"
    if change <= limit:
        return f"{who} keeps documents apart ({moved})."
    return f"{who} lets the second document see the first ({moved})."


@torch.no_grad()
def packing(model: Any, lm: RecurrentLM | None, *, seed: int = 0) -> Packing:
    """Read two packed documents twice, the first replaced in between, and compare the second one's logits.

    Args:
        model: a causal LM of transformers, whose own forward is tried.
        lm: the same model opened by longroll; None where longroll does not know it.
        seed: seed of the tokens.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(seed)
    first, other, second = (
        torch.randint(vocabulary, (n,), generator=generator).tolist() for n in (LENGTHS[0], *LENGTHS)
    )
    limit = ROUNDING if model.dtype.itemsize >= 4 else 50 * ROUNDING

    def change(read: Any) -> float:
        a, b = (read([one, second])[0, LENGTHS[0] :].float() for one in (first, other))
        share: float = ((a - b).abs().max() / a.abs().max().clamp_min(1e-12)).item()
        return share

    def by_longroll(documents: list[list[int]]) -> Tensor:
        assert lm is not None
        ids = torch.tensor([[token for document in documents for token in document]], device=model.device)
        starts = torch.zeros_like(ids)
        starts[0, LENGTHS[0]] = 1
        logits: Tensor = lm(ids, starts=starts)[0]
        return logits

    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)

    def by_itself(documents: list[list[int]]) -> Tensor:
        batch = collate([{"input_ids": document} for document in documents])
        batch = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        batch.pop("labels")
        logits: Tensor = model(**batch, use_cache=False).logits  # as trainers call it
        return logits

    own, own_error = None, ""
    try:
        own = change(by_itself)
    except Exception as error:  # a model may fail in any way on a batch that it does not know
        own_error = f"fails on it ({type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]})"
    return Packing(None if lm is None else change(by_longroll), own, own_error, limit)


def open_for_packing(
    name: str, *, device: str | None = None, trust_remote_code: bool = False, plugin: str | None = None
) -> tuple[Any, RecurrentLM | None]:
    """Return the model of a checkpoint, and the same opened by longroll where longroll knows it.

    Raises:
        LongrollError: where neither longroll nor transformers opens it.
    """
    from longroll.model import load

    try:
        lm = load(name, device=device, trust_remote_code=trust_remote_code, plugin=plugin)
    except LongrollError as refusal:
        from transformers import AutoModelForCausalLM

        try:
            model: Any = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=trust_remote_code)
        except Exception:
            raise refusal from None
        return model.to(torch.device(device or "cpu")).eval(), None
    return lm.model, lm
