"""Activations that the backward pass recomputes from what another op keeps anyway, instead of keeping them too.

A convolution keeps its input for its backward pass. If that input is the output of `norm_act`, which keeps its own
input, one elementwise pass makes it again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakTensorKeyDictionary


class Kept:
    """A tensor that is kept as it is."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.version = values._version

    def __call__(self) -> Tensor:
        """The tensor.

        Raises:
            RuntimeError: it was modified in place.
        """
        if self.values._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.values.shape)} was modified in place after the forward pass, but the "
                "backward pass needs it as it was"
            )
        return self.values


class Recipe:
    """How a tensor is computed: `function(*arguments)`. An argument with a recipe of its own is not held in memory."""

    def __init__(self, function: Callable[..., Tensor], arguments: tuple[Any, ...]) -> None:
        self.function = function
        self.arguments = [_packed(a) if isinstance(a, Tensor) else a for a in arguments]
        self.depth: int = 1 + max((a.depth for a in self.arguments if isinstance(a, Recipe)), default=0)

    def __call__(self) -> Tensor:
        """The tensor, computed anew."""
        return self.function(*(a() if isinstance(a, Kept | Recipe) else a for a in self.arguments))


class _Block(threading.local):
    max_depth = 0  # 0 outside of `recompute_activations`


_block = _Block()
_recipes = WeakTensorKeyDictionary()  # of tensors: their version then, and their recipe


def keep_recipe(values: Tensor, function: Callable[..., Tensor], *arguments: Any) -> None:
    """Within `recompute_activations`, ops do not keep `values` for their backward pass but call the function then."""
    if torch.compiler.is_compiling() or not _block.max_depth or not values.requires_grad:
        return
    recipe = Recipe(function, arguments)
    if recipe.depth <= _block.max_depth:
        _recipes[values] = values._version, recipe


@contextmanager
def recompute_activations(max_depth: int = 2) -> Iterator[None]:
    """A network called within the block keeps few outputs of `norm_act` for its backward pass: about half the memory.

    The gradients are the same to the bit. As without the block, the backward pass raises RuntimeError if a tensor that
    it needs was modified in place. `torch.compile` chooses by itself what it recomputes; there, this does nothing.
    Within the block, torch's non-reentrant checkpointing saves nothing.

    Args:
        max_depth: a tensor is kept if computing it again would take more than this many ops in a row.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        yield
        return
    before, _block.max_depth = _block.max_depth, max_depth
    try:
        with saved_tensors_hooks(_packed, _unpacked):
            yield
    finally:
        _block.max_depth = before


def _packed(values: Tensor) -> Kept | Recipe:
    version, recipe = _recipes.get(values, (None, None))
    return recipe if recipe is not None and version == values._version else Kept(values)


def _unpacked(kept: Kept | Recipe) -> Tensor:
    with torch.no_grad():
        return kept()
