"""A recurrent language model as a function `(tokens, state) -> (logits, state)`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from longroll import ranks
from longroll._plugins import Build, Plugin
from longroll._self_check import check_chunks, check_gradients, check_pure, check_weights
from longroll.checkpoint import Checkpoint, common_dtype, stored_tensors, unused_names
from longroll.errors import LongrollError, first_line, named
from longroll.families import (
    BUILT_IN,
    MODEL_TYPE,
    PlainFamily,
    PlainModel,
    family_of,
    is_original,
    is_rwkv_file,
    load_original,
    load_rwkv,
    model_class,
)
from longroll.families._family import Restart
from longroll.families._spread import STRATEGIES, spread
from longroll.families.int8 import holds_int8, to_int8
from longroll.history import read_beside
from longroll.locate import (
    base_of_adapter,
    default_device,
    device_of,
    dtype_of,
    entry_of,
    load_code,
    local_folder,
    read_config,
    source_of,
)
from longroll.state import Part, RecurrentState

logger = logging.getLogger("longroll")
UNTRIED = ("xpu", "mps")
"""Devices that run the ops in PyTorch and that no test has seen."""


@dataclass(frozen=True)
class RecurrentLayer:
    """One recurrent layer, so that statistics can name "layer 12, head 3"."""

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
        self.adapted: Any = model if hasattr(model, "get_base_model") else None
        model = _base_model(model)
        if not isinstance(model, PreTrainedModel):
            raise LongrollError(
                f"{type(model).__name__} is not a transformers model: use longroll.wrap(...)."
            )
        self.family = PlainFamily() if isinstance(model, PlainModel) else family_of(model.config.model_type)
        if any(parameter.is_meta for parameter in model.parameters()):
            raise LongrollError(
                f"{model.config.model_type}: some weights are offloaded or were never loaded: put the whole "
                "model on a device, without offloading in its device_map."
            )
        if getattr(model, "is_quantized", False):
            raise LongrollError(
                f"{model.config.model_type} is quantised, and mixers read weights as numbers: open its "
                "folder with longroll.load, or call its dequantize() first."
            )
        self.family.prepare(model)
        self.model = model
        self.name = name or model.config.name_or_path or model.config.model_type
        self.checkpoint: Checkpoint | None = None
        self.flags: tuple[str, ...] | None = ()
        """Flags that the command line needs besides `name` to open the model again; None: the command line
        cannot.
        """
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
            attention_mask: (B, T), 1 at real tokens and 0 at padding; None: every token is real.
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
        """Return logits (..., V) in float32 or wider of hidden states (..., d_model)."""
        logits = self.family.head(self.model, hidden)
        return logits if logits.dtype == torch.float64 else logits.float()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def int8(self) -> bool:
        """Whether linear layers hold their weights in 8 bits (`load(..., dtype="int8")`)."""
        return holds_int8(self.model)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: ids at or above it are outside the vocabulary."""
        return self.family.vocab_size(self.model)

    @property
    def width(self) -> int:
        """Numbers of a hidden state, as `logits=False` gives it."""
        return self.family.width(self.model)

    @property
    def own(self) -> bool:
        """Whether the model is of a family that longroll does not bring: the user's, or another package's."""
        return self.model.config.model_type not in BUILT_IN

    @property
    def wrapped(self) -> bool:
        """Whether the model is a module that `wrap` made a RecurrentLM of."""
        return isinstance(self.model, PlainModel)

    @property
    def train_length(self) -> int | None:
        """The length the model was trained at, where its config says so: see `find_train_length`."""
        found = self._stated_length()
        return found and found[0]

    def find_train_length(self, given: int | None = None) -> tuple[int, str]:
        """Return the training length T, and where it comes from.

        `train_length` and RWKV's `context_length` mean the training length. `max_position_embeddings` bounds
        the positions of attention, which is the training length where all layers are attention; hybrids state
        what their attention could reach (Jamba: 262,144), and recurrent models a default that nothing reads.

        Args:
            given: what the user says; it goes before everything else.

        Raises:
            LongrollError: for a config that does not say.
        """
        if given is not None:
            return given, "as given"
        found = self._stated_length()
        if found is None:
            positions = self._entry("max_position_embeddings")
            reach = f" (max_position_embeddings {positions} says how far it may read)" if positions else ""
            raise LongrollError(
                f"{self.name} does not say at which length it was trained{reach}: give `train_length`."
            )
        return found

    def _stated_length(self) -> tuple[int, str] | None:
        entries = ["train_length", "context_length"]
        if self.family.kind == "attention":
            entries += [self.family.learned_positions or "", "max_position_embeddings"]
        for entry in entries:
            value = self._entry(entry) if entry else None
            if value is not None:
                return value, f"{entry} in the model's config"
        return None

    def _entry(self, entry: str) -> int | None:
        """Return a number of the config, or of its text model's."""
        config = self.model.config
        holders = (holder for holder in (config, config.get_text_config()))
        values = (getattr(holder, entry, None) for holder in holders)
        value = next((value for value in values if value), None)
        try:
            return value if value is None else int(value)
        except (TypeError, ValueError, OverflowError):
            raise LongrollError(
                f"{entry} {value!r} in the model's config is no length: give `train_length`, or correct the "
                "config."
            ) from None

    @property
    def layers(self) -> list[RecurrentLayer]:
        """The recurrent layers, in order; empty for the Transformer control."""
        if self._layers is None:
            self._layers = [
                RecurrentLayer(
                    key.layer, self.family.layer_kind(self.model, key), t.shape[1], tuple(t.shape[1:])
                )
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
        """Return the zero state, spelled out: recurrent and conv tensors, no KV."""
        probe = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        _, state = self(probe, logits=False)
        recurrent: RecurrentState = state.part("recurrent", "conv")
        return recurrent.map(lambda t: torch.zeros(batch_size, *t.shape[1:], dtype=t.dtype, device=t.device))

    def self_check(self, *, tokens: int = 48, seed: int = 0) -> None:
        """Refuse to go on with a model whose numbers would be wrong.

        A chunked forward must be the full one. A model of another family must also be a
        function of tokens and state, write into neither, and let the gradient through from the initial state
        to the logits and the final state.

        Args:
            tokens: how many are read, at least 7.
            seed: random seed of the tokens.

        Raises:
            LongrollError: for weights that are not finite, and for what does not hold; it names the layer.
        """
        was_training = self.training
        self.eval()
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(self.vocab_size, (2, tokens), generator=generator).to(self.device)
        check_weights(self)
        if self.own:
            check_pure(self, ids)
        check_chunks(self, ids)
        if self.own and self.family.recurrent:
            check_gradients(self, ids)
        self.train(was_training)


def wrap(
    module: nn.Module,
    *,
    vocab_size: int,
    train_length: int | None = None,
    head: Callable[[Tensor], Tensor] | None = None,
    name: str = "",
    batch_axis: int | Mapping[str, int] | None = None,
    part: Mapping[str, Part] | None = None,
) -> RecurrentLM:
    """Make a `RecurrentLM` of any module whose `forward(ids, state)` returns `(logits, state)`.

    The state is a tensor, or a tuple, list or dict of tensors, nested to any depth, whose sizes depend on the
    batch alone; None is the zero state. A few forwards show how it is laid out; `print(lm)` and `lm.layers`
    say what was found. The name of a state tensor is its keys and indices from the root, joined by dots (`h`,
    `0.conv`), or `state` where there is one tensor only. Training changes the module itself, not a copy.

    Args:
        module: the model; ids are (B, T), logits (B, T, vocab_size).
        vocab_size: V.
        train_length: the length the model was trained at.
        head: maps what the module returns, hidden states (B, T, ...), to logits; a submodule of `module`, a
            module beside it, or a function. None: the module returns logits.
        name: what to call it in reports; default: the module's class.
        batch_axis: which axis of the state tensors is the batch, for all or by name. A batch axis above 0, as
            nn.GRU has, comes after one that counts layers. Default: the axis whose size follows the batch.
        part: parts of the state tensors that are named, `recurrent`, `conv` (tails of short convolutions,
            token shifts) or `attention` (what a new text starts without, such as positions: no intervention
            sets it). Default: `conv` where a tensor depends on the last few tokens only, `attention` for
            integers.

    Returns:
        The model in eval mode, after its self-check.

    Raises:
        LongrollError: for a forward or a state that is not as said here, arguments that do not fit them, and
            a failed self-check; it names the tensor.
    """
    if isinstance(module, RecurrentLM):
        raise LongrollError(f"{module.name} is a RecurrentLM: it needs no wrap.")
    model = PlainModel(
        module,
        vocab_size=vocab_size,
        train_length=train_length,
        head=head,
        name=name,
        batch_axis=batch_axis,
        part=part,
    )
    lm = RecurrentLM(model).eval()
    lm.flags = None
    lm.self_check()
    return lm


def _base_model(model: Any) -> PreTrainedModel:
    """Return the model inside peft's wrapper, which runs the adapters that sit on its layers."""
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise LongrollError(
            f"{type(model).__name__}: adapters that add tokens to the prompt cannot be read with a state: "
            "use LoRA, or another method that adapts layers."
        )
    inner: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner


def load(
    path_or_hub_id: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: str | dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    plugin: str | Build | None = None,
) -> RecurrentLM:
    """Open a checkpoint: a folder of transformers, fla or state-spaces, a hub id of one, an RWKV `.pth` file.

    Args:
        path_or_hub_id: a folder, a file, a hub id, or "specimen" for the small model inside the package; with
            a `plugin` that builds models a name that it knows, or a folder of a model that it built.
        device: default: cuda, else xpu or mps if the model passes its self-check there, else the CPU;
            "auto" is `device_map` "auto".
        dtype: default: float32 on a CPU, the checkpoint's own on a GPU; for a plug-in's models: their own.
            "int8": large linear layers in 8 bits, layer by layer on their way to the device, and the rest in
            the default dtype (`longroll.families.int8`). Such a model is read, or trained by adapters.
        device_map: instead of `device`: accelerate's, as `from_pretrained` of transformers takes it. "auto"
            spreads the layers over all GPUs, for models larger than one; each layer's state, keys and values
            stay where the layer is. Such a model is read, not trained.
        trust_remote_code: run code that comes with the checkpoint; off unless the user asks. It runs before
            the model type is judged, so that it can register its family.
        plugin: `my_module`, imported first, or `my_module:build`, or the function `build` itself, which makes
            a RecurrentLM, an nn.Module or a model of transformers of the name.

    Returns:
        The model in eval mode, after its self-check.

    Raises:
        LongrollError: for a missing or broken checkpoint, an unknown architecture, a plug-in that fails, a
            failed self-check, a `device_map` beside a `device` or "int8", and one that leaves weights off
            the GPUs.
    """
    lm = read(
        path_or_hub_id, device=device, dtype=dtype, device_map=device_map,
        trust_remote_code=trust_remote_code, plugin=plugin,
    )  # fmt: skip
    if lm.checkpoint is not None and lm.checkpoint.unused:
        logger.warning(
            "%s: %d tensors of its files are not in %s and not used (posttrain copies them): %s.",
            lm.name, len(lm.checkpoint.unused), type(lm.model).__name__, _few(lm.checkpoint.unused),
        )  # fmt: skip
    return lm


def read(
    path_or_hub_id: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: str | dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    plugin: str | Build | None = None,
) -> RecurrentLM:
    """Return `load` without its notices."""
    if device == "auto":
        device, device_map = None, device_map or "auto"
    if device_map is not None and device is not None:
        raise LongrollError("`device` and `device_map` both say where the model is to lie: give one of them.")
    if device_map is not None and ranks.world_size() > 1:
        raise LongrollError(
            "`device_map` spreads a model over the GPUs of one process: start one, or leave it out."
        )
    if device_map is not None and device_map not in STRATEGIES:
        for place in {*device_map.values()} - {"disk"} if isinstance(device_map, dict) else {device_map}:
            device_of(place, "device_map")
    untried = device is None and device_map is None and default_device() in UNTRIED
    device = torch.device(default_device()) if untried else device_of(device or default_device())
    int8 = dtype in ("int8", torch.int8)
    if int8 and device_map is not None:
        raise LongrollError(
            "`dtype` int8 puts a model on one device: name one as `device`, or leave `dtype` out."
        )
    if int8:
        dtype = None
    elif isinstance(dtype, str) and dtype != "auto":
        dtype = dtype_of(dtype)
    name = str(path_or_hub_id)
    imported = None if plugin is None else Plugin(plugin)
    if imported is not None and imported.build is not None:
        lm = _build(imported, name)
        if isinstance(dtype, torch.dtype):
            lm = lm.to(dtype)
        if device_map is not None:
            spread(lm.model, device_map)
    else:
        dtype = dtype or (torch.float32 if device.type == "cpu" else "auto")
        model, checkpoint = _open(name, dtype, trust_remote_code, device_map)
        if device_map is not None:
            spread(model, device_map)
        lm = RecurrentLM(model, name=name)
        lm.checkpoint = checkpoint
    if imported is not None:
        lm.flags = imported.flags
    elif trust_remote_code:
        lm.flags = ("--trust-remote-code",)
    if int8:
        check_weights(lm)
        turned, total = to_int8(lm.model, lm.width, device=device)
        logger.warning(
            "%s: %.0f %% of its %s numbers are in 8 bits, the rest in %s.",
            name, 100 * turned / total, f"{total:,}", str(lm.model.dtype).removeprefix("torch."),
        )  # fmt: skip
    if untried:
        return _on_untried(lm, device)
    lm = lm.eval() if device_map is not None else lm.to(device).eval()
    lm.self_check()
    return lm


def _on_untried(lm: RecurrentLM, device: torch.device) -> RecurrentLM:
    """Return the model on a device that no test has seen, or on the CPU if it fails its check there."""
    try:
        lm = lm.to(device).eval()
        lm.self_check()
    except (LongrollError, RuntimeError, TypeError, AssertionError) as problem:
        said = first_line(problem)
        logger.warning("%s does not run on %s, so the CPU is used: %s", lm.name, device.type, said)
        lm = lm.to("cpu", torch.float32).eval()
        lm.self_check()
    return lm


def _few(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _open(
    name: str,
    dtype: torch.dtype | str,
    trust_remote_code: bool,
    device_map: str | dict[str, Any] | None = None,
) -> tuple[PreTrainedModel, Checkpoint]:
    source = source_of(name)
    if is_rwkv_file(source):
        model, checkpoint = load_rwkv(Path(source), dtype=dtype)
        read_beside(model.config, checkpoint.folder)
        return model, checkpoint
    base = base_of_adapter(source)
    if base is not None:
        model, checkpoint = _open(base, dtype, trust_remote_code)
        return _with_adapter(model, source), checkpoint
    config = read_config(source)
    if is_original(config):
        model, checkpoint = load_original(local_folder(source), dtype=dtype)
        read_beside(model.config, checkpoint.folder)
        return model, checkpoint
    model_type = config.get("model_type")
    if model_type == MODEL_TYPE:
        raise LongrollError(
            f"{source} holds the weights of a module that was wrapped: `plugin` names what builds it "
            f"({config.get('plugin') or 'my_module:build'})."
        )
    load_code(source, config, trusted=trust_remote_code)
    family_of(model_type)
    loader = model_class(model_type) or AutoModelForCausalLM
    model, unexpected = _load_transformers(loader, source, dtype, trust_remote_code, device_map)
    folder = local_folder(source, only_config=True)  # where transformers keeps the rest too
    stored = stored_tensors(folder)
    own = common_dtype(stored.values())
    if getattr(model, "is_quantized", False):
        model, unexpected = _dequantised(model, source, dtype), set()  # the files' scales are used
        own = own or getattr(torch, str(entry_of(config, "dtype", "torch_dtype")), torch.float16)
    return model, Checkpoint(folder, own, unused=unused_names(stored, model, unexpected))


def _dequantised(model: PreTrainedModel, source: str, dtype: torch.dtype | str) -> PreTrainedModel:
    """Return the model whose weights are the numbers that the quantised ones stand for."""
    method = getattr(model, "quantization_method", None)
    method = getattr(method, "value", method)
    try:
        plain: Any = model.dequantize()
    except Exception as error:
        raise LongrollError(
            f"{source} is quantised ({method}), and transformers cannot turn its weights into plain ones: "
            "open the checkpoint that it was made from."
        ) from error
    logger.warning(
        "%s is quantised (%s): it is read, trained and saved as the plain weights that it stands for.",
        source, method,
    )  # fmt: skip
    plain._weight_conversions = None  # would quantise what is saved
    cast: PreTrainedModel = plain.to(dtype) if isinstance(dtype, torch.dtype) else plain
    return cast


def _with_adapter(model: PreTrainedModel, source: str) -> PreTrainedModel:
    """Return `model` with the adapter of a PEFT folder merged into its weights."""
    try:
        from peft import PeftModel
    except ImportError:
        raise LongrollError(f"{source} is a PEFT adapter: pip install 'longroll[lora]'.") from None
    try:
        merged: PreTrainedModel = PeftModel.from_pretrained(model, source).merge_and_unload()
        return merged
    except Exception as error:  # of another model, of another kind, damaged
        raise LongrollError(f"{source} cannot be merged into its base: {first_line(error)}") from error


def _build(plugin: Plugin, name: str) -> RecurrentLM:
    """Return what a plug-in makes of a name; of a folder of a model that it built: that model with these
    weights.
    """
    saved = _saved_module(name)
    built = (saved.get("built") or name) if saved else name
    made = plugin(built)
    if isinstance(made, nn.Module) and not isinstance(made, RecurrentLM | PreTrainedModel):
        made = wrap(made, vocab_size=_logits_width(made), name=name)
    if not isinstance(made, RecurrentLM | PreTrainedModel):
        raise LongrollError(
            f"`plugin` {plugin.name} gives {type(made).__name__} for {built!r}, not a RecurrentLM, an "
            "nn.Module or a model of transformers."
        )
    lm = made if isinstance(made, RecurrentLM) else RecurrentLM(made)
    lm.name = name
    if isinstance(lm.model, PlainModel):
        lm.model.config.plugin, lm.model.config.built = plugin.name, built
        if saved is not None:
            lm.model.load_weights(Path(name))
            lm.model.config.train_length = saved.get("train_length")
    elif saved is not None:
        raise LongrollError(
            f"{name} holds the weights of a wrapped module, and `plugin` {plugin.name} gives "
            f"{type(lm.model).__name__} for {built!r}: name the plug-in that built it."
        )
    return lm


def _saved_module(name: str) -> dict[str, Any] | None:
    """Return the config beside the weights of a wrapped module, where `name` is such a folder."""
    if not (Path(name) / "config.json").is_file():
        return None
    config = read_config(name)
    return config if config.get("model_type") == MODEL_TYPE else None


@torch.no_grad()
def _logits_width(module: nn.Module) -> int:
    """Return V of a module that returns logits."""
    weight = next(module.parameters(), None)
    ids = torch.zeros(1, 1, dtype=torch.long, device=None if weight is None else weight.device)
    try:
        width: int = module(ids, None)[0].shape[-1]
        return width
    except Exception as error:
        raise LongrollError(
            f"{type(module).__name__}: forward(ids, None) gives no logits: {named(error)}"
        ) from error


def _load_transformers(
    loader: Any,
    source: str,
    dtype: torch.dtype | str,
    trust_remote_code: bool,
    device_map: str | dict[str, Any] | None,
) -> tuple[PreTrainedModel, set[str]]:
    try:
        loaded: Any = loader.from_pretrained(
            source, dtype=dtype, trust_remote_code=trust_remote_code, device_map=device_map,
            output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # every way in which a checkpoint can be broken comes up here
        raise LongrollError(f"{source} cannot be loaded: {error}") from error
    model, info = loaded
    for problem in ("missing_keys", "mismatched_keys"):
        if info[problem]:
            keys = sorted(map(str, info[problem]))
            raise LongrollError(f"{source}: {len(keys)} weights are {problem.split('_')[0]}: {keys[:3]}.")
    return model, info["unexpected_keys"]


__all__ = ["RecurrentLM", "RecurrentLayer", "load", "wrap"]
