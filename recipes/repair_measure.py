"""What recipes/repair.py measures of a model, from the zero state: losses, memory, accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from repair_models import Plan
from repair_text import CUE, SPAN, Books, recall_rows, windows
from torch import Tensor

from longroll import RecurrentLM, position_loss, state_statistics
from longroll.measure import remembrance_map
from longroll.measure._position_loss import log_spaced
from longroll.measure.remembrance import spread_starts

TEXTS = 26  # long texts, two a book
SHORT = 520  # windows of T
RECALL = 78  # rows at each distance
DISTANCES = (0.5, 2, 4, 16)  # of recall, in T
AT_ONCE = 1 << 15  # tokens of a forward: several processes share a GPU's memory
FRESH = 64  # T at which the same tokens are read from a fresh state, too


class Measures:
    """The texts of all measures of a plan, and the measures.

    Args:
        plan: gives T and the longest position.
        tokens: the folder of `repair_text.prepare`.
        device: of the model.
        share: of the rows of each measure that are read, to try the script.
    """

    def __init__(self, plan: Plan, tokens: Path, device: torch.device, *, share: float = 1.0) -> None:
        T, self.plan, self.device = plan.length, plan, device
        valid, aside = Books.load(tokens / "valid.xz"), Books.load(tokens / "development.xz")
        self.aside = aside
        texts, short, recall = (max(valid.count, round(share * n)) for n in (TEXTS, SHORT, RECALL))
        self.long, _ = windows(valid, plan.longest * T, texts)
        self.short, self.book = windows(valid, T, short)
        self.recall = {d: recall_rows(valid, round(d * T), T, recall) for d in DISTANCES}
        self.cloze = torch.from_numpy(np.load(tokens / "cloze.npy").astype(np.int64))[:, -T - 1 :]
        self.cloze = self.cloze[:: max(1, round(1 / share))]
        self.aside_long, _ = windows(aside, min(64, plan.longest) * T, aside.count)
        self.aside_short, _ = windows(aside, T, short)

    def octaves(self) -> list[tuple[int, int]]:
        """Ranges of positions: [0, T), then an octave each."""
        T, found = self.plan.length, [(0, self.plan.length)]
        while found[-1][1] < self.plan.longest * T:
            found.append((found[-1][1], 2 * found[-1][1]))
        return found

    def development(self, lm: RecurrentLM) -> dict[str, float]:
        """In range, and the mean over the octaves past T to 64 T, of books to choose by."""
        with self._reading(lm):
            inside = self._losses(lm, self.aside_short).mean().item()
            losses = self._losses(lm, self.aside_long)
        past = [(a, b) for a, b in self.octaves() if self.plan.length <= a < losses.shape[1]]
        beyond = [losses[:, a:b].mean().item() for a, b in past]
        return {"in_range": inside, "beyond": float(np.mean(beyond))}

    def losses(self, lm: RecurrentLM) -> dict[str, Any]:
        """In range by book, octaves by text, a curve, and tokens at 64 T read from a fresh state."""
        T, octaves = self.plan.length, self.octaves()
        with self._reading(lm):
            short = self._losses(lm, self.short)
            inside = [short[self.book == book].mean().item() for book in range(int(self.book.max()) + 1)]
            losses = self._losses(lm, self.long)
            stop = min(FRESH * T, losses.shape[1])
            again = self.long[:, stop // 2 : stop + 1].unfold(1, 4 * T + 1, 4 * T)
            fresh = self._losses(lm, again.flatten(0, 1))[:, T:].mean(1).view(len(losses), -1).mean(1)
        read = losses[:, stop // 2 : stop].unflatten(1, (-1, 4 * T))[:, :, T:].mean((1, 2))
        edges = [edge for edge in log_spaced(losses.shape[1], 4) if edge >= 4]
        pairs = list(zip([0, *edges[:-1]], edges, strict=True))
        return {
            "in_range": inside,
            "octaves": [[a, b] for a, b in octaves],
            "by_octave": [_rounded(losses[:, a:b].mean(1)) for a, b in octaves],
            "curve": {"stop": edges, "loss": [round(losses[:, a:b].mean().item(), 5) for a, b in pairs]},
            "at": stop // T,
            "read_on": _rounded(read),
            "read_fresh": _rounded(fresh),
        }

    def memory(self, lm: RecurrentLM) -> dict[str, Any]:
        """Recall of a copied span at some distances, in nats gained and in accuracy; cloze accuracy."""
        recall = {}
        with self._reading(lm):
            for distance, (told, untold) in self.recall.items():
                learned = SPAN - CUE
                known, right = self._tail(lm, told, learned)
                unknown, _ = self._tail(lm, untold, learned)
                recall[f"{distance:g}"] = {
                    "gain": _rounded((unknown - known).mean(1)),
                    "accuracy": right.float().mean().item(),
                }
            _, right = self._tail(lm, self.cloze, 1)
        return {"recall": recall, "cloze": right.float().mean().item(), "cloze_rows": len(self.cloze)}

    def depth(self, lm: RecurrentLM) -> dict[str, Any]:
        """Effective remembrance at 32 T, where there is no attention, and the state's std."""
        T = self.plan.length
        texts = self.long[:8, : min(32, self.plan.longest) * T]
        positions = [T // 4, T // 2, *(stop for _, stop in self.octaves())]
        with self._reading(lm):
            state = state_statistics(lm, self.long[:8], positions).to_json()
            layers = [{key: layer[key] for key in ("layer", "std")} for layer in state["layers"]]
            found = {"state": state | {"layers": layers}}
            if not lm.has_attention:  # its rows would be read once a start
                found["remembrance"] = remembrance_map(lm, texts, spread_starts(texts.shape[1])).to_json()
        return found

    def _reading(self, lm: RecurrentLM) -> Any:
        lm.eval()
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def _losses(self, lm: RecurrentLM, rows: Tensor) -> Tensor:
        parts = []
        for some in rows.split(128):
            chunk = 4 * self.plan.length if lm.has_attention else max(64, AT_ONCE // len(some))
            parts.append(position_loss(lm, some, chunk_size=chunk).losses)
        return torch.cat(parts).double()

    @torch.no_grad()
    def _tail(self, lm: RecurrentLM, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Losses (B, count) of the last tokens of rows, and whether each is the likeliest."""
        losses, right = [], []
        for some in rows.split(max(1, AT_ONCE // rows.shape[1])):
            ids, state, hidden = some.to(self.device), None, None
            for piece in ids[:, :-1].split(4096, dim=1):
                read, state = lm(piece, state, logits=False)
                hidden = read if hidden is None else torch.cat([hidden[:, -count:], read], dim=1)
            logits = lm.head(hidden[:, -count:])
            targets = ids[:, -count:]
            losses.append(-logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0].cpu())
            right.append((logits.argmax(-1) == targets).cpu())
        return torch.cat(losses), torch.cat(right)


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 5) for value in values.tolist()]
