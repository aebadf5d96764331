"""The one network of all supported families, told apart by `ModelConfig` alone.

Knows tensors and the step's plan. Invariant: every tensor of the checkpoint is used, and nothing else is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

import kernels
from worker.layers.attention import Attention
from worker.layers.linear import Linear
from worker.layers.mlp import GatedMlp
from worker.layers.rotary import Angles, RotaryEmbedding
from worker.models.config import ModelConfig
from worker.weights import Checkpoint

Pack = Callable[..., kernels.Weight]


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Norm, attention, norm, MLP, each half added to the residual stream."""

    attention_norm: torch.Tensor  # [hidden_size]
    attention: Attention
    mlp_norm: torch.Tensor  # [hidden_size]
    mlp: GatedMlp
    norm_eps: float

    def __call__(
        self,
        update: torch.Tensor | None,
        residual: torch.Tensor,
        angles: Angles,
        layer_kv: kernels.KV,
        plan: kernels.AttentionPlan,
        *,
        last: kernels.LastRows | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes the layer before's `update`, not yet added to `residual` (both [num_tokens, hidden_size]); returns its
        own and the residual stream before it, of all tokens or those of `last`."""
        if update is None:
            normed = kernels.rms_norm(residual, self.attention_norm, self.norm_eps)
        else:
            normed, residual = kernels.add_rms_norm(update, residual, self.attention_norm, self.norm_eps)
        mixed = self.attention(normed, angles, layer_kv, plan, last)
        if last is not None:
            residual = residual.index_select(0, last.rows)
        normed, residual = kernels.add_rms_norm(mixed, residual, self.mlp_norm, self.norm_eps)
        return self.mlp(normed), residual

    def weights(self) -> kernels.LayerWeights:
        """The layer's tensors."""
        of, mlp = self.attention, self.mlp
        return kernels.LayerWeights(
            attention_norm=self.attention_norm,
            qkv=(of.qkv.weight, of.qkv.bias),
            qk_norm=of.qk_norm,
            output=(of.output.weight, of.output.bias),
            mlp_norm=self.mlp_norm,
            gate_up=(mlp.gate_up.weight, mlp.gate_up.bias),
            down=(mlp.down.weight, mlp.down.bias),
            window=of.window,
        )


@dataclass(frozen=True, slots=True)
class Decoder:
    """Token ids to hidden states to logits."""

    config: ModelConfig
    embedding: torch.Tensor  # [vocab_size, hidden_size]
    layers: tuple[DecoderLayer, ...]
    norm: torch.Tensor  # [hidden_size]
    head: Linear
    rotary: RotaryEmbedding
    stack: kernels.CpuStack | None = None  # the layers as one, where that is faster

    def hidden(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        layers_kv: Sequence[kernels.KV],
        plan: kernels.AttentionPlan,
        last: kernels.LastRows | None = None,
    ) -> torch.Tensor:
        """Final hidden states of `token_ids[num_tokens]` at `positions[num_tokens]` (both int64): all of them, or those
        of `last`. `layers_kv` has one cache view a layer."""
        normed = kernels.run_layers(self.stack, token_ids, positions, layers_kv, plan, last=last)
        if normed is not None:
            return normed
        far = self.config.sink_reach if plan.sink_work else None
        angles = self.rotary(positions, farthest=far)
        return self._layer_by_layer(F.embedding(token_ids, self.embedding), angles, layers_kv, plan, last)

    def _layer_by_layer(
        self,
        residual: torch.Tensor,
        angles: Angles,
        layers_kv: Sequence[kernels.KV],
        plan: kernels.AttentionPlan,
        last: kernels.LastRows | None,
    ) -> torch.Tensor:
        update: torch.Tensor | None = None
        for layer, layer_kv in zip(self.layers, layers_kv, strict=True):
            wanted = last if layer is self.layers[-1] else None
            update, residual = layer(update, residual, angles, layer_kv, plan, last=wanted)
        assert update is not None
        normed, _ = kernels.add_rms_norm(update, residual, self.norm, self.config.norm_eps)
        return normed

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden[n, hidden_size]` to `[n, vocab_size]` float32."""
        return self.head(hidden).float()


def load_decoder(config: ModelConfig, checkpoint: Checkpoint, pack: Pack = kernels.pack) -> Decoder:
    """Read every weight, each matrix as `pack` makes it. Raises `ConfigError` on a missing, misshaped or left-over
    tensor."""
    embedding = checkpoint.read(["model.embed_tokens.weight"], [(config.vocab_size, config.hidden_size)])
    layers = tuple(_layer(config, checkpoint, index, pack) for index in range(config.num_layers))
    if config.tied_head:
        checkpoint.ignore("lm_head.weight")
        head = Linear(pack(embedding))
    else:
        head = Linear(pack(checkpoint.read(["lm_head.weight"], [(config.vocab_size, config.hidden_size)])))
    norm = _vector(checkpoint, "model.norm.weight", config.hidden_size)
    checkpoint.finish()
    rotary = RotaryEmbedding(
        config.rope,
        config.head_dim,
        device=checkpoint.device,
        dtype=checkpoint.dtype,
        endless=config.window is not None,
    )
    weights = [layer.weights() for layer in layers]
    stack = kernels.stack(
        kernels.DecoderWeights(embedding, weights, norm, head.weight, rotary.frequencies),
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        norm_eps=config.norm_eps,
    )
    return Decoder(config, embedding, layers, norm, head, rotary, stack)


def _layer(config: ModelConfig, checkpoint: Checkpoint, index: int, pack: Pack) -> DecoderLayer:
    prefix = f"model.layers.{index}."
    # Older Llama checkpoints store the rope frequencies, which follow from the configuration.
    checkpoint.ignore(prefix + "self_attn.rotary_emb.inv_freq")
    return DecoderLayer(
        attention_norm=_vector(checkpoint, prefix + "input_layernorm.weight", config.hidden_size),
        attention=_attention(config, checkpoint, prefix + "self_attn.", config.windows[index], pack),
        mlp_norm=_vector(checkpoint, prefix + "post_attention_layernorm.weight", config.hidden_size),
        mlp=_mlp(config, checkpoint, prefix + "mlp.", pack),
        norm_eps=config.norm_eps,
    )


def _attention(config: ModelConfig, checkpoint: Checkpoint, prefix: str, window: int | None, pack: Pack) -> Attention:
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    parts = [(prefix + "q_proj", queries), (prefix + "k_proj", keys), (prefix + "v_proj", keys)]
    return Attention(
        qkv=_linear(checkpoint, parts, config.hidden_size, bias=config.qkv_bias, pack=pack),
        output=_linear(
            checkpoint, [(prefix + "o_proj", config.hidden_size)], queries, bias=config.output_bias, pack=pack
        ),
        qk_norm=_qk_norm(config, checkpoint, prefix) if config.qk_norm else None,
        norm_eps=config.norm_eps,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        window=window,
        sinks=config.sinks if window is not None and window == config.sink_window else 0,
    )


def _qk_norm(config: ModelConfig, checkpoint: Checkpoint, prefix: str) -> torch.Tensor:
    query = _vector(checkpoint, prefix + "q_norm.weight", config.head_dim)
    key = _vector(checkpoint, prefix + "k_norm.weight", config.head_dim)
    return torch.cat((query.expand(config.num_heads, -1), key.expand(config.num_kv_heads, -1)))


def _mlp(config: ModelConfig, checkpoint: Checkpoint, prefix: str, pack: Pack) -> GatedMlp:
    parts = [(prefix + "gate_proj", config.intermediate_size), (prefix + "up_proj", config.intermediate_size)]
    down = [(prefix + "down_proj", config.hidden_size)]
    return GatedMlp(
        gate_up=_linear(checkpoint, parts, config.hidden_size, bias=config.mlp_bias, pack=partial(pack, gated=True)),
        down=_linear(checkpoint, down, config.intermediate_size, bias=config.mlp_bias, pack=pack),
    )


def _linear(checkpoint: Checkpoint, parts: Sequence[tuple[str, int]], inputs: int, *, bias: bool, pack: Pack) -> Linear:
    weight = checkpoint.read([f"{name}.weight" for name, _ in parts], [(outputs, inputs) for _, outputs in parts])
    if not bias:
        return Linear(pack(weight))
    names, sizes = [f"{name}.bias" for name, _ in parts], [(outputs,) for _, outputs in parts]
    return Linear(pack(weight), checkpoint.read(names, sizes))


def _vector(checkpoint: Checkpoint, name: str, size: int) -> torch.Tensor:
    return checkpoint.read([name], [(size,)])
