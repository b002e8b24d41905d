"""Routed experts sparsified by a plain float64 loop over tokens and experts, weights taken out by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mixtures import first_projection, product, second_projection
from sparsity_atlas.terms import TENSORS

Keep = Callable[[Tensor, "Weights", int, str], Tensor]
"""Which entries of a row stay: (row, weights of its expert, layer, tensor) to bool."""


class Weights:
    """The matrices of one expert: float64 [outputs, inputs]; without a gate, g is None."""

    def __init__(self, module: Any, number: int) -> None:
        self.number = number
        down, first = module.down_proj[number], None
        if not module.has_gate:
            self.u, self.g = module.up_proj[number], None
            if module.is_transposed:
                self.u = self.u.T
        else:
            first = module.gate_up_proj[number]
            first = first.T if module.is_transposed else first
            if type(module).__name__ == "GptOssExperts":  # in turn, the gate first
                self.g, self.u = first[::2], first[1::2]
            else:
                self.g, self.u = first.chunk(2)
        self.d = down.T if module.is_transposed else down
        self.u, self.d = self.u.detach().double(), self.d.detach().double()
        self.g = None if self.g is None else self.g.detach().double()

    def read_by(self, tensor: str) -> Tensor:
        """What reads a tensor, one matrix above the other."""
        if tensor != "input":
            return self.d
        return self.u if self.g is None else torch.cat([self.u, self.g])


def factors(module: Any, z: Tensor) -> dict[str, Tensor]:
    """u and g of z [2w]."""
    if type(module).__name__ == "GptOssExperts":
        gate, up = z[::2].clamp(max=module.limit), z[1::2].clamp(-module.limit, module.limit)
        return {"up": up + 1, "gate": gate * torch.sigmoid(gate * module.alpha)}
    gate, up = z.chunk(2)
    return {"up": up, "gate": module.act_fn(gate)}


class Loop:
    """A float64 copy of a model whose experts are computed one token and one expert at a time.

    Attributes:
        model: the copy.
        zeros: of each layer, tensor and token: dropped or zero.
        rows: of each layer, tensor and expert: what it had there, before anything was dropped of it.
    """

    def __init__(self, model: nn.Module, paths: list[str], site: str, keep: Keep) -> None:
        self.model = copy.deepcopy(model).double()
        self.zeros: dict[tuple[int, str], list[int]] = {}
        self.rows: dict[tuple[int, str, int], list[Tensor]] = {}
        self._tensors = TENSORS[site]
        self._keep = keep
        for layer, path in enumerate(paths):
            module = self.model.get_submodule(path)
            module.forward = self._forward(module, layer)  # type: ignore[method-assign]

    def __call__(self, ids: Tensor) -> Tensor:
        self.zeros.clear()
        self.rows.clear()
        with torch.no_grad():
            return self.model(input_ids=ids, use_cache=False).logits

    def _forward(self, module: Any, layer: int) -> Callable[..., Tensor]:
        experts = [Weights(module, number) for number in range(module.num_experts)]

        def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            out = torch.zeros_like(hidden_states)
            for token, ids in enumerate(top_k_index.tolist()):
                counted = dict.fromkeys(self._tensors, 0)
                for place, number in enumerate(ids):
                    own = experts[number]

                    def kept(
                        tensor: str,
                        row: Tensor,
                        own: Weights = own,
                        counted: dict[str, int] = counted,
                    ) -> Tensor:
                        self.rows.setdefault((layer, tensor, own.number), []).append(row)
                        if tensor not in self._tensors:
                            return torch.ones_like(row, dtype=torch.bool)
                        mask = self._keep(row, own, layer, tensor)
                        counted[tensor] += int((~mask | (row == 0)).sum())
                        return mask

                    x = hidden_states[token]
                    z = first_projection(module, number, torch.where(kept("input", x), x, 0))
                    i = product(module, z)
                    if module.has_gate:
                        for tensor, row in factors(module, z).items():
                            i = torch.where(kept(tensor, row), i, 0)
                    i = torch.where(kept("intermediate", i), i, 0)
                    out[token] += second_projection(module, number, i) * top_k_weights[token, place]
                for tensor, zeros in counted.items():
                    self.zeros.setdefault((layer, tensor), []).append(zeros)
            return out

        return forward


def largest(level: float) -> Keep:
    """Weighted top-k and WINA: the ⌊level · width⌋ largest of |v_j| · ‖W[:, j]‖."""

    def keep(row: Tensor, own: Weights, layer: int, tensor: str) -> Tensor:
        scores = row.abs() * own.read_by(tensor).norm(dim=0)
        order = scores.argsort(descending=True)
        return torch.zeros_like(row, dtype=torch.bool).index_fill_(
            0, order[: math.floor(level * len(row) + 1e-9)], True
        )

    return keep


def share(level: float) -> Keep:
    """Weighted top-p: the fewest that hold this share of Σ |v_j| · ‖W[:, j]‖."""

    def keep(row: Tensor, own: Weights, layer: int, tensor: str) -> Tensor:
        scores = row.abs() * own.read_by(tensor).norm(dim=0)
        order = scores.argsort(descending=True)
        before = scores[order].cumsum(0) - scores[order]
        fewest = order[before < level * scores.sum()]
        return torch.zeros_like(row, dtype=torch.bool).index_fill_(0, fewest, True)

    return keep
