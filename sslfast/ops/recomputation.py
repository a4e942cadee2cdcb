"""Activations that the backward pass recomputes from what another op keeps anyway, instead of keeping them too.

A convolution keeps its input for its backward pass. If that input is the output of `norm_act`, which keeps its own
input, one elementwise pass makes it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakTensorKeyDictionary

_recipes = WeakTensorKeyDictionary()
_deepest = 0  # within a block, the most recipes that may need one another


class Recipe:
    """How a tensor is computed: `function(*arguments)`. An argument with a recipe of its own is not held in memory."""

    def __init__(self, function: Callable[..., Tensor], arguments: tuple[Any, ...]) -> None:
        self.function = function
        self.arguments = [_packed(a) if isinstance(a, Tensor) else a for a in arguments]
        self.depth: int = 1 + max((a.depth for a in self.arguments if isinstance(a, Recipe)), default=0)

    def __call__(self) -> Tensor:
        """The tensor, computed anew."""
        return self.function(*(a() if isinstance(a, Recipe) else a for a in self.arguments))


def keep_recipe(values: Tensor, function: Callable[..., Tensor], *arguments: Any) -> None:
    """Within `recompute_activations`, ops do not keep `values` for their backward pass but call the function then."""
    if not _deepest or not values.requires_grad:
        return
    recipe = Recipe(function, arguments)
    if recipe.depth <= _deepest:
        _recipes[values] = recipe


@contextmanager
def recompute_activations(deepest: int = 2) -> Iterator[None]:
    """A network called within the block keeps no output of `norm_act` for its backward pass: about half the memory.

    The gradients are the same to the bit. `torch.compile` chooses by itself what it recomputes; there, this does
    nothing.

    Args:
        deepest: a tensor is kept if computing it again would take more than this many ops in a row.
    """
    global _deepest
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        yield
        return
    before, _deepest = _deepest, deepest
    try:
        with saved_tensors_hooks(_packed, _unpacked):
            yield
    finally:
        _deepest = before


def _packed(values: Tensor) -> Tensor | Recipe:
    recipe: Recipe | None = _recipes.get(values)
    return values if recipe is None else recipe


def _unpacked(kept: Tensor | Recipe) -> Tensor:
    with torch.no_grad():
        return kept() if isinstance(kept, Recipe) else kept
