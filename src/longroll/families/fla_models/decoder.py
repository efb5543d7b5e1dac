"""The decoder around the six mixers: fla's names, `model.layers.N.{attn_norm,attn,mlp_norm,mlp}`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from longroll.families.fla_models.cache import FlaCache, LayerState
from longroll.families.fla_models.layers import Attention, GatedMLP, RMSNorm, unsupported


class FlaConfig(PreTrainedConfig):
    """The fields that all six configs of fla have, with its defaults.

    `attn_mode` and the `fuse_*` fields choose fla's kernels and `use_l2warp` changes the loss that fla's own
    training adds: they are kept for fla and change nothing here, save that `fuse_norm` names a parameter.
    """

    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (Trainer adds a list to it)

    vocab_size: int = 32000
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    hidden_ratio: float | None = 4
    intermediate_size: int | None = None
    hidden_act: str = "swish"
    max_position_embeddings: int | None = 2048
    norm_eps: float = 1e-6
    attn: dict | list | None = None
    attn_mode: str = "chunk"
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    fuse_norm: bool = True
    fuse_swiglu: bool = True
    fuse_cross_entropy: bool = True
    fuse_linear_cross_entropy: bool = False
    use_l2warp: bool = False
    attnres_block_size: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Refuse what the modules here do not compute."""
        super().__post_init__(**kwargs)
        if self.attnres_block_size is not None:
            raise unsupported(self, "attnres_block_size", "attention residuals are not implemented")
        for entry in self._attentions():
            self._check(entry)

    def attention(self, layer: int) -> dict | None:
        """Return what `attn` says of a layer: None where it keeps the family's own mixer."""
        return next((entry for entry in self._attentions() if layer in entry["layers"]), None)

    def _attentions(self) -> list:
        return [] if self.attn is None else self.attn if isinstance(self.attn, list) else [self.attn]

    def _check(self, entry: Any) -> None:
        """Refuse an entry of `attn` that fla refuses, or that no module can be made of."""
        if not isinstance(entry, dict) or not {"layers", "num_heads"} <= entry.keys():
            raise unsupported(self, "attn", "an entry names its layers and num_heads")
        depth, window = self.num_hidden_layers, entry.get("window_size")
        if not all(isinstance(layer, int) and 0 <= layer < depth for layer in entry["layers"]):
            raise unsupported(self, "attn", f"layers go from 0 to {depth - 1}")
        heads = entry["num_heads"]
        if heads < 1 or self.hidden_size % heads or heads % (entry.get("num_kv_heads") or heads):
            raise unsupported(self, "attn", "heads divide hidden_size, and kv heads divide them")
        if window is not None and window < 1:
            raise unsupported(self, "attn", "a window has at least one token")


_REFUSED = (
    "cu_seqlens",
    "cu_seq_lens_q",
    "seq_idx",
    "position_ids",
    "output_hidden_states",
    "output_attentions",
)


class Block(GradientCheckpointingLayer):
    """A mixer and an MLP, each behind its norm."""

    # the cache's initial state is only read and its final one only assigned: a recompute does the same again
    _can_checkpoint_with_cache = True
    mixer: type[nn.Module]

    def __init__(self, config: FlaConfig, layer: int) -> None:
        super().__init__()
        self.layer_idx = layer
        self.attn_norm = norm_of(config)
        self.attn = mixer_of(config, layer, self.mixer)
        self.mlp_norm = norm_of(config)
        self.mlp = GatedMLP(config)

    def forward(self, x: Tensor, past_key_values: FlaCache | None = None) -> Tensor:
        """Return (B, T, hidden) -> (B, T, hidden)."""
        x = x + self.attn(self.attn_norm(x), LayerState(past_key_values, self.layer_idx))
        return x + self.mlp(self.mlp_norm(x))


def norm_of(config: FlaConfig) -> nn.Module:
    """Return RMSNorm of the hidden size, or LayerNorm for RWKV's configs, which say whether it has a bias."""
    bias = getattr(config, "norm_bias", None)
    if bias is None:
        return RMSNorm(config.hidden_size, eps=config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=bias)


def mixer_of(config: FlaConfig, layer: int, mixer: type[nn.Module]) -> nn.Module:
    """Return the layer's own mixer, or attention where the config says so."""
    attention = config.attention(layer)
    return mixer(config, layer) if attention is None else Attention(config, attention)


class FlaPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of these models."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _input_embed_layer = "embeddings"
    _is_stateful = True


class Decoder(FlaPreTrainedModel):
    """Embeddings, blocks and the last norm."""

    block: type[nn.Module]

    def __init__(self, config: FlaConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(self.block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = norm_of(config)
        self.gradient_checkpointing = False
        self._no_split_modules = [self.block.__name__]
        self.post_init()

    def blocks(self, x: Tensor, cache: FlaCache | None) -> Tensor:
        """Run the blocks, (B, T, hidden) -> (B, T, hidden)."""
        for layer in self.layers:
            x = layer(x, past_key_values=cache)
        return x

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: FlaCache | None = None,
        use_cache: bool | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPast:
        """Read `input_ids` (B, T) or `inputs_embeds` (B, T, hidden) from the cache's initial state.

        With `use_cache`, `past_key_values` of the output is a cache that goes on from the final state.

        Raises:
            ValueError: for an attention mask with padding, and for packed rows: a recurrence would read on.
        """
        for name in _REFUSED:
            if others.get(name) is not None and others[name] is not False:
                raise ValueError(f"{name} is not supported by longroll's {self.config.model_type}.")
        if attention_mask is not None and not attention_mask.all():
            raise ValueError(
                "padding is not supported: leave attention_mask out and pad on the right, or not."
            )
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = FlaCache()
        hidden = self.norm(self.blocks(x, past_key_values))
        following: Any = None
        if use_cache and past_key_values is not None:
            following = FlaCache(past_key_values.final(x.shape[1]))
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=following)


class CausalLM(FlaPreTrainedModel, GenerationMixin):
    """A decoder with its head."""

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}  # noqa: RUF012 (transformers' name)
    decoder: type[Decoder]

    def __init__(self, config: FlaConfig) -> None:
        super().__init__(config)
        self.model = self.decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def model_type(cls) -> str:
        """Return what `config.json` calls the family."""
        assert cls.config_class is not None
        return cls.config_class.model_type

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the first forward makes a FlaCache

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As `Decoder.forward`, with logits, and the next-token loss of `labels` (B, T) where given."""
        outputs = self.model(input_ids, **kwargs, return_dict=True)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)
