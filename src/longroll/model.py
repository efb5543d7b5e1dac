"""A recurrent language model as a function `(tokens, state) -> (logits, state)`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from longroll.errors import LongrollError
from longroll.families import (
    family_of,
    is_original,
    is_rwkv_file,
    load_original,
    load_rwkv,
    model_class,
)
from longroll.families._family import Restart
from longroll.state import RecurrentState

_FLIPPED = 0.2
"""How far a state or half of the tokens' logits may be from what they should be, after experts that flip."""


@dataclass(frozen=True)
class RecurrentLayer:
    """One recurrent layer, so that statistics can speak of "layer 12, head 3"."""

    layer: int
    kind: str
    heads: int
    """Axis 1 of the state; for Mamba-1 its channels, which are heads of size one (Mamba-2 paper, 7.2)."""
    shape: tuple[int, ...]
    """Shape of the recurrent state without the batch axis."""


class RecurrentLM(nn.Module):
    """A causal LM of transformers with its state in the open.

    `lm(input_ids, state)` reads `state` without ever writing into it and returns the final state on the
    graph; the caller detaches. `state=None` is the zero state. Any number of tokens >= 1, any split.

    Args:
        model: a transformers model of a family in `longroll.families`.
        name: what to call it in reports.
    """

    def __init__(self, model: PreTrainedModel, *, name: str = "") -> None:
        super().__init__()
        self.family = family_of(model.config.model_type)
        self.family.prepare(model)
        self.model = model
        self.name = name or model.config.name_or_path or model.config.model_type
        self._layers: list[RecurrentLayer] | None = None
        self.train(model.training)

    def forward(
        self,
        input_ids: Tensor,
        state: RecurrentState | None = None,
        *,
        logits: bool = True,
        attention_mask: Tensor | None = None,
        starts: Tensor | None = None,
        restart: Restart = "zero",
    ) -> tuple[Tensor, RecurrentState]:
        """Read tokens from a state.

        Args:
            input_ids: (B, T) token ids, T >= 1.
            state: the initial state; None is the zero state.
            logits: False returns the hidden states that `head` maps to logits, so that the logits of a
                long sequence need never exist at once.
            attention_mask: (B, T), nonzero at real tokens; None: every token is real.
            starts: (B, T), nonzero at the first token of each document inside a row; None: each row is one
                document, which goes on from `state`.
            restart: what a document marked in `starts` starts from: "zero", or "state": `state`'s of its row.

        Returns:
            Logits (B, T, V), or hidden states (B, T, d_model), zero at padding; and the state after the last
            real token of each row. The state of rows that read different numbers of tokens lacks keys and
            values (`RecurrentState.ragged`).
        """
        output, final_state = self.family.run(
            self.model, input_ids, state,
            attention_mask=attention_mask, starts=starts, restart=restart, logits=logits,
        )  # fmt: skip
        return (output.logits if logits else output.last_hidden_state), final_state

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) in float32 or wider of hidden states (..., d_model)."""
        logits = self.family.head(self.model, hidden)
        return logits if logits.dtype == torch.float64 else logits.float()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: ids at or above it are outside the vocabulary."""
        weight: Tensor = self.model.get_input_embeddings().weight  # type: ignore[assignment]
        return weight.shape[0]

    @property
    def train_length(self) -> int | None:
        """The length the model was trained at, where its config says so."""
        learned = self.family.learned_positions
        config = self.model.config
        for entry in ("train_length", learned, "max_position_embeddings", "context_length"):
            for holder in (config, config.get_text_config()):
                value = getattr(holder, entry, None) if entry else None
                if value is not None:
                    return int(value)
        return None

    @property
    def layers(self) -> list[RecurrentLayer]:
        """The recurrent layers, in order; empty for the Transformer control."""
        if self._layers is None:
            self._layers = [
                RecurrentLayer(key.layer, self.family.kind, t.shape[1], tuple(t.shape[1:]))
                for key, t in self.zero_state(1).items()
                if key.part == "recurrent"
            ]
        return self._layers

    @cached_property
    @torch.no_grad()
    def has_attention(self) -> bool:
        """Whether layers look back at keys and values of earlier tokens."""
        _, state = self(torch.zeros(1, 1, dtype=torch.long, device=self.device), logits=False)
        return any(key.part == "attention" for key in state)

    @torch.no_grad()
    def zero_state(self, batch_size: int) -> RecurrentState:
        """The zero state, spelled out: recurrent and conv tensors, no KV."""
        probe = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        _, state = self(probe, logits=False)
        state = state.part("recurrent", "conv")
        return state.map(lambda t: torch.zeros(batch_size, *t.shape[1:], dtype=t.dtype, device=t.device))

    @torch.no_grad()
    def self_check(self, *, tokens: int = 48, seed: int = 0) -> None:
        """Refuse to go on with a model whose chunked forward is not its full forward.

        Args:
            tokens: how many are read, at least 7.
            seed: of the tokens.

        Raises:
            LongrollError: for weights that are not finite, and for a chunked forward (two long chunks, one
                token, two) whose states or logits differ from the full one; it names the layer.
        """
        for parameter_name, parameter in self.model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise LongrollError(
                    f"{self.name}: {parameter_name} holds NaN or infinity; the checkpoint is broken."
                )
        was_training = self.training
        self.eval()
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(self.vocab_size, (2, tokens), generator=generator).to(self.device)
        full, full_state = self(ids)
        pieces, state = [], None
        half = tokens // 2
        for piece in ids.split([half, tokens - half - 3, 1, 2], dim=1):  # a state lost last shows most
            hidden, state = self(piece, state, logits=False)
            pieces.append(self.head(hidden))
        assert state is not None
        limit, flips = self._limit(), self._flips()
        for key in full_state:
            apart = _apart(state[key].flatten(), full_state[key].flatten())
            at_most = _FLIPPED if flips and key.layer else limit
            self._hold(f"layer {key.layer}, {key.part} state", apart, at_most)
        logits = torch.cat(pieces, dim=1)
        if flips:
            self._hold("the logits", _apart(logits, full)[:, half:].median(), _FLIPPED)
        else:
            self._hold("the logits", _apart(logits.flatten(), full.flatten()), limit)
        self.train(was_training)

    def _hold(self, what: str, apart: Tensor, limit: float) -> None:
        difference, dtype = apart.item(), next(self.model.parameters()).dtype
        if not difference < limit:  # NaN fails too
            raise LongrollError(
                f"{self.name} fails the self-check at {what}: a chunked forward differs from the full one by "
                f"{difference:.1e} (relative; limit {limit:.0e}, {dtype}). Its numbers past one chunk would "
                "be wrong. Update transformers, or report this with the model's config."
            )

    def _limit(self) -> float:
        """How far apart rounding may drive two forwards that should be one."""
        if next(self.model.parameters()).dtype.itemsize < 4:
            return 5e-2
        return 1e-3 if self.device.type == "cpu" else 1e-2  # where cudnn and fla take tf32 for float32

    def _flips(self) -> bool:
        """Whether a rounding may send a token to other experts."""
        exact = next(self.model.parameters()).dtype.itemsize >= 4 and self.device.type == "cpu"
        return not exact and any("expert" in name for name, _ in self.model.named_modules())


def _apart(actual: Tensor, expected: Tensor) -> Tensor:
    """Norm of the difference of (..., D) over that of what is expected, (...)."""
    return (actual - expected).float().norm(dim=-1) / expected.float().norm(dim=-1).clamp_min(1e-6)


def load(
    path_or_hub_id: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
) -> RecurrentLM:
    """Open a checkpoint: a folder of transformers, fla or state-spaces, a hub id of one, an RWKV `.pth` file.

    Args:
        path_or_hub_id: a folder, a file, a hub id, or "specimen" for the small model inside the package.
        device: default: a GPU if there is one.
        dtype: default: float32 on a CPU, the checkpoint's own on a GPU.
        trust_remote_code: run code that comes with the checkpoint; off unless the user asks.

    Returns:
        The model in eval mode, after its self-check.

    Raises:
        LongrollError: for a missing or broken checkpoint, an unknown architecture, a failed self-check.
    """
    device = _device_of(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if isinstance(dtype, str) and dtype != "auto":
        dtype = _dtype_of(dtype)
    dtype = dtype or (torch.float32 if device.type == "cpu" else "auto")
    name = str(path_or_hub_id)
    folder = SPECIMEN if name == "specimen" else Path(name)
    source = str(folder) if folder.exists() else name
    if is_rwkv_file(source):
        model = load_rwkv(Path(source), dtype=dtype)
    elif is_original(config := _read_config(source)):
        model = load_original(_local_folder(source), dtype=dtype)
    else:
        family_of(config.get("model_type"))
        loader = model_class(config.get("model_type")) or AutoModelForCausalLM
        model = _load_transformers(loader, source, dtype, trust_remote_code)
    lm = RecurrentLM(model, name=name).to(device).eval()
    lm.self_check()
    return lm


SPECIMEN = Path(__file__).parent / "assets" / "specimen"
"""The small model inside the package that breaks past its training length."""


def _device_of(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise LongrollError(f"`device` {device} is not to be had here: {reason}. Try cpu.") from None


def _dtype_of(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise LongrollError(f"`dtype` {name} is not a torch dtype: try float32, bfloat16 or float16.")
    return found


def _read_config(source: str) -> dict:
    path = _local_folder(source, only_config=True) / "config.json"
    if not path.is_file():
        raise LongrollError(f"{source} has no config.json: name a folder that holds a model.")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise LongrollError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(config, dict):
        raise LongrollError(f"{path} holds no model's config: it must be a JSON object.")
    return config


def _local_folder(source: str, *, only_config: bool = False) -> Path:
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise LongrollError(f"{source} is not a model folder: check the path.")
    from huggingface_hub import snapshot_download

    patterns = ["config.json"] if only_config else ["config.json", "pytorch_model.bin"]
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except Exception as error:
        raise LongrollError(
            f"{source} is neither a folder here nor to be had from the hub ({type(error).__name__}). Check "
            "the name and the network, or name a local folder."
        ) from None


def _load_transformers(
    loader: Any, source: str, dtype: torch.dtype | str, trust_remote_code: bool
) -> PreTrainedModel:
    try:
        loaded: Any = loader.from_pretrained(
            source, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except Exception as error:  # every way in which a checkpoint can be broken comes up here
        raise LongrollError(f"{source} cannot be loaded: {error}") from error
    model, info = loaded
    for problem in ("missing_keys", "mismatched_keys"):
        if info[problem]:
            keys = sorted(map(str, info[problem]))
            raise LongrollError(f"{source}: {len(keys)} weights are {problem.split('_')[0]}: {keys[:3]}.")
    return model


__all__ = ["SPECIMEN", "RecurrentLM", "RecurrentLayer", "load"]
