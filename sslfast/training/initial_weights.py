"""Weights to begin a run with, from another run or a state dict: those whose name and shape fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sslfast.errors import UserError
from sslfast.training.checkpoint import checkpoint_file, load_checkpoint

State = dict[str, Tensor]

NESTED = ("state_dict", "network_weights", "model")  # where trainers keep a state dict in their checkpoints
BEFORE = ("", "module.", "_orig_mod.", "network.", "model.")  # what wrappers put before the names
WITHIN = ("", "network.")  # what `WithFeatures` puts before those of a network of MONAI
SHOWN = 4  # names in a message


class Fit(NamedTuple):
    """What a state dict has for a network."""

    taken: list[tuple[Tensor, Tensor]]  # a tensor of the network, and what it becomes
    numbers: int  # in these tensors
    left: dict[str, list[str]]  # names by the reason why they are not


def init_networks(path: Path, networks: Sequence[nn.Module]) -> list[str]:
    """Fills network_a and network_b from `path`, the folder or a checkpoint of a run, or the file of a state dict.

    Of the two networks of a run, each takes the one of which more fits, if equal that of its own letter.

    Returns:
        For each network a line that says what it took, and maybe a warning.

    Raises:
        UserError: the file cannot be read, or nothing in it fits, or weights in it are NaN or infinite.
    """
    states, origin = read_states(path)
    fits = [
        max((_fit(network, state) for state in _ordered(states, i)), key=_size) for i, network in enumerate(networks)
    ]
    if not any(own.ndim > 1 for fit in fits for own, _ in fit.taken):  # biases alone are nothing
        name, value = next(iter(states[0].items()))
        raise UserError(
            f"--init-from {path}: no weight fits by name and shape; {origin}, and begins with {name} "
            f"{list(value.shape)}. Choose the same --network-a or --network-b, --width, --depth, --pooling and --norm, "
            "or leave out --init-from"
        )
    if not all(bool(value.isfinite().all()) for fit in fits for _, value in fit.taken):
        raise UserError(f"--init-from {path}: weights in it are NaN or infinite; use an earlier checkpoint")
    with torch.no_grad():
        for fit in fits:
            for own, value in fit.taken:
                own.copy_(value)
    lines = [_described(path, letter, network, fit) for letter, network, fit in zip("ab", networks, fits, strict=True)]
    if len(states) == 1 and not any(fit.left for fit in fits):
        lines.append("warning: both networks begin with the same weights, and have little to learn from each other")
    return lines


def read_states(path: Path) -> tuple[list[State], str]:
    """The state dicts of a file: of both networks of a run, or a single one; and words that say where they are from.

    Raises:
        UserError: the file cannot be read, or holds no state dict.
    """
    file = checkpoint_file(path)
    remedy = "give the folder of a run, or a file that torch.save(network.state_dict(), FILE) wrote"
    if not file.is_file():
        raise UserError(f"--init-from {path}: there is no {file}; {remedy}")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever reading the bytes of another program may raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--init-from {path}: {file} holds more than tensors, or is damaged ({reason}); {remedy}"
        ) from error
    if isinstance(content, dict) and {"format", "model"} <= {*content}:
        model = load_checkpoint(file)["model"]  # once its digest is checked
        states = [_tensors(model.get(f"network_{letter}")) for letter in "ab"]
        settings = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in _settings(model))
        origin = f"it is a run with {settings}"
    else:
        nested = [content[key] for key in NESTED if key in content] if isinstance(content, dict) else []
        states = [_tensors(next((part for part in nested if _tensors(part)), content))]
        origin = f"it holds {len(states[0])} tensors"
    if not all(states):
        raise UserError(f"--init-from {path}: {file} holds no weights by their names; {remedy}")
    return states, origin


def _settings(model: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    networks = model.get("networks")
    names = ("network_a", "network_b", "width", "depth", "norm")
    return ((name, networks[name]) for name in names if isinstance(networks, dict) and name in networks)


def _tensors(content: Any) -> State:
    items = content.items() if isinstance(content, dict) else ()
    return {name: value for name, value in items if isinstance(name, str) and isinstance(value, Tensor)}


def _ordered(states: list[State], own: int) -> list[State]:
    return [states[own], *(state for i, state in enumerate(states) if i != own)] if len(states) > 1 else states


def _size(fit: Fit) -> int:
    return fit.numbers


def _fit(network: nn.Module, state: State) -> Fit:
    """The best of what fits, with prefixes removed from the names in the file and put before them."""
    own = network.state_dict(keep_vars=True)
    renamed = (
        {put + name.removeprefix(cut): value for name, value in state.items()} for cut in BEFORE for put in WITHIN
    )
    return max((_match(own, candidate) for candidate in renamed), key=_size)


def _match(own: State, state: State) -> Fit:
    aliases: dict[int, list[str]] = {}  # MONAI's `DynUNet` has two names for each tensor
    for name, value in own.items():
        aliases.setdefault(id(value), []).append(name)
    taken: list[tuple[Tensor, Tensor]] = []
    left: dict[str, list[str]] = {}
    for names in aliases.values():
        value = own[names[0]]
        found = [state[name] for name in names if name in state]
        fitting = [other for other in found if _fits(value, other)]
        if fitting:
            taken.append((value, fitting[0]))
        else:
            left.setdefault(_reason(value, found), []).append(names[0])
    return Fit(taken, sum(value.numel() for value, _ in taken), left)


def _fits(own: Tensor, other: Tensor) -> bool:
    return own.shape == other.shape and own.is_floating_point() == other.is_floating_point() and not other.is_complex()


def _reason(own: Tensor, found: list[Tensor]) -> str:
    if not found:
        return "not in the file"
    before, now = found[0].shape, own.shape
    if len(before) == len(now) == 5 and before[0] == now[0] and before[2:] == now[2:]:
        return f"of {before[1]} instead of {now[1]} input channels"
    return "of another shape"


def _described(path: Path, letter: str, network: nn.Module, fit: Fit) -> str:
    count = len(fit.taken) + sum(map(len, fit.left.values()))
    numbers = sum(value.numel() for value in {id(v): v for v in network.state_dict(keep_vars=True).values()}.values())
    left = "; ".join(
        ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "") + f" ({reason})"
        for reason, names in fit.left.items()
    )
    share = f"{len(fit.taken)} of {count} tensors ({100 * fit.numbers / numbers:.1f} % of its weights) taken"
    return f"--init-from {path}: network_{letter} {share}" + (f"; left: {left}" if left else "")
