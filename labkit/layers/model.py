"""A stack of layers and a last norm: the model that the experiments time and weigh.

It has no embedding and no output over a vocabulary: those are products of dense matrices that
no choice of attention changes, and at these sizes they would hide what the layers cost.

Taught in chapter 10 (fp32, fp16, which kernel, and who decides).
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn

from labkit.errors import check_positive_int
from labkit.layers.layer import AttentionLayer

__all__ = ["TransformerModel"]


class TransformerModel(nn.Module):
    """``num_layers`` times ``AttentionLayer``, then a LayerNorm: ``[B, N, dim]`` likewise.

    Parameters
    ----------
    dim, num_heads : int
        of each layer.
    num_layers : int
        how many.
    **options
        of each layer: ``backend``, ``causal``, ``checkpoint``, ``device``, ``dtype``, ….

    Raises
    ------
    ArgumentError
        naming the argument that does not fit.

    Notes
    -----
    State dicts load strictly across backends, as a layer's do.
    """

    def __init__(self, dim: int, num_heads: int, num_layers: int, **options: Any) -> None:
        super().__init__()
        num_layers = check_positive_int("num_layers", num_layers)
        made = {name: options.get(name) for name in ("device", "dtype")}
        self.layers = nn.ModuleList(
            AttentionLayer(dim, num_heads, **options) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim, **made)

    @classmethod
    def report(cls, **options: Any) -> TransformerModel:
        """dim 256, 4 heads, 2 layers: our choice, for the benchmark report gives no size."""
        return cls(256, 4, 2, **options)

    @classmethod
    def realistic(cls, **options: Any) -> TransformerModel:
        """dim 1024, 16 heads, 2 layers: layers as wide as those of a small language model."""
        return cls(1024, 16, 2, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, N, dim]`` → ``[B, N, dim]``; errors as for a layer."""
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    @property
    def dim(self) -> int:
        return self.layers[0].dim

    @property
    def backend(self) -> str:
        return self.layers[0].backend

    def to_backend(self, backend: str, **changes: Any) -> TransformerModel:
        """A new model with a copy of these weights; see ``AttentionLayer.to_backend``."""
        # One by one: somebody may have given the layers different patterns.
        layers = [layer.to_backend(backend, **changes) for layer in self.layers]
        model = TransformerModel(self.dim, layers[0].num_heads, 1, backend="sdpa", device="meta")
        model.layers, model.norm = nn.ModuleList(layers), deepcopy(self.norm)
        model.training = self.training
        return model
