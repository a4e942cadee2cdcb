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

DEEPEST = 2  # recipes that need one another; further ones are not kept

_recipes = WeakTensorKeyDictionary()
_recomputes = False


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
    if not _recomputes or not values.requires_grad:
        return
    recipe = Recipe(function, arguments)
    if recipe.depth <= DEEPEST:
        _recipes[values] = recipe


@contextmanager
def recompute_activations() -> Iterator[None]:
    """A network called within the block keeps no output of `norm_act` for its backward pass: about half the memory.

    The gradients are the same to the bit. `torch.compile` chooses by itself what it recomputes; there, this does
    nothing.
    """
    global _recomputes
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        yield
        return
    before, _recomputes = _recomputes, True
    try:
        with saved_tensors_hooks(_packed, _unpacked):
            yield
    finally:
        _recomputes = before


def _packed(values: Tensor) -> Tensor | Recipe:
    recipe: Recipe | None = _recipes.get(values)
    return values if recipe is None else recipe


def _unpacked(kept: Tensor | Recipe) -> Tensor:
    with torch.no_grad():
        return kept() if isinstance(kept, Recipe) else kept
