"""Compares this machine's bfloat16 convolutions with float32, at the shapes of a training run.

Of each it compares the output and the gradients as training computes them, and the output as evaluation does: with
batch normalisation folded in, a residual and a ReLU.

oneDNN has been wrong on CPUs, without an error:
- in the weight gradient for inputs whose first spatial axis has size 2; `SameConv3d` computes those in float32;
- with AMX, in strided convolutions whose output has an innermost axis of size 1, which are those to the bottom stage if
  the last axis of a patch is 2^(depth-1) (https://github.com/pytorch/pytorch/issues/169688).
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sslfast.errors import UserError
from sslfast.networks import NormAct, build_networks
from sslfast.networks.conv_norms import convolve_folded
from sslfast.networks.vnet import EncoderDecoder
from sslfast.options import PATCH, PATCH_SIZES, NetworkOptions
from sslfast.precision import autocast_dtype
from sslfast.ranges import check_ranges
from sslfast.training.checkpoint import load_model

TOLERANCE = 0.02  # of the largest value; rounding to bfloat16 gives up to 0.008
PATCHES = 4  # of a training step with the default batches; the kernel that oneDNN chooses depends on it
LARGE = 2**22  # values; one patch is enough for a convolution of more
WRONG = "WRONG"  # begins the line of a wrong convolution


def check_convolutions(run: Path | None, patch: Sequence[int] | None, width: int | None, depth: int | None) -> None:
    """Compares the bfloat16 convolutions of a run with float32, on the CPU and the GPU, and prints the result.

    Args:
        run: a run's folder or checkpoint file. None: the trainer's defaults.
        patch, width, depth: take the place of the run's.

    Raises:
        UserError: there is no such run, the networks do not take this patch, or a convolution is wrong.
    """
    options, num_classes, size, channels = NetworkOptions(), 2, PATCH, 1
    if run is not None:
        model = load_model(run)
        options, num_classes, size = model.options, len(model.classes), model.patch
        channels = len(model.channels)
    x, y, z = patch or size
    width, depth = (options.width if width is None else width), (options.depth if depth is None else depth)
    options = replace(options, width=width, depth=depth)
    shown = f"patch {x} {y} {z}, width {width}, depth {depth}"
    check_ranges(options)
    if fault := PATCH_SIZES.fault((x, y, z)):
        raise UserError(f"--patch {x} {y} {z}: it must be {fault}")
    try:
        layers = convolutions(options, num_classes, (x, y, z), channels)
    except ValueError as error:
        raise UserError(f"{shown}: {error}") from error

    def progress(done: int) -> None:
        if sys.stderr.isatty():
            print(f"  {done} of {len(layers)} compared", end="\r", file=sys.stderr, flush=True)

    print(f"\nbf16 convolutions, {options.network_a} and {options.network_b}, {shown}")
    is_wrong = False
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        label = "CPU" if device == "cpu" else "GPU"
        for line in report(layers, torch.device(device), progress):
            print(f"  {label:<14} {line}")
            label = ""
            is_wrong |= line.startswith(WRONG)
    if is_wrong:
        raise UserError("bf16 convolutions are wrong on this machine; train and predict with --precision fp32")


def report(
    layers: list[Convolution], device: torch.device, progress: Callable[[int], None] = lambda done: None
) -> list[str]:
    """Lines that say what was found on a device.

    Args:
        progress: is called with the number of convolutions done.
    """
    if autocast_dtype("auto", device) is None:
        return ["bf16 is not used here: --precision auto means fp32"]
    results = []
    for done, layer in enumerate(layers):
        progress(done)
        results.append(compare(layer, device))
    wrong = [result for result in results if result.faults]
    guarded = [result for result in results if result.in_float32 and not result.faults]
    right = [result for result in results if not (result.in_float32 or result.faults)]
    lines = []
    if right:
        error = max(result.error for result in right)
        lines.append(f"{len(right)} shapes agree with float32 (largest error {100 * error:.1f} % of the largest value)")
    for result in guarded:
        lines.append(f"guarded, computed in float32: {result.convolution}")
    for result in wrong:
        lines.append(f"{WRONG}: {result.convolution}: {', '.join(result.faults)}")
    return lines


@dataclass(frozen=True)
class Convolution:
    """A convolution as a network calls it."""

    module: nn.Conv3d | nn.ConvTranspose3d
    grid: tuple[int, int, int]
    """Spatial size of its input."""
    values: int
    """Number of values of its input or output, the larger of them, for one patch."""
    input_gradient: bool
    """Whether training needs the gradient of its input."""
    evaluation_patches: int
    """How many patches it takes at once in evaluation."""
    folds: bool
    """Whether evaluation folds batch normalisation into it."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """[patches, channels, D, H, W], in training."""
        return max(1, min(PATCHES, LARGE // self.values)), self.module.in_channels, *self.grid

    def __str__(self) -> str:
        module = self.module
        kind = "transposed " if module.transposed else ""
        stride = "" if set(module.stride) == {1} else f", stride {_times(module.stride)}"
        channels = f"{module.in_channels} to {module.out_channels} channels"
        return f"{kind}{_times(module.kernel_size)}, {channels}{stride}, input {_times(self.input_shape)}"


@dataclass(frozen=True)
class Comparison:
    """What was found for one convolution."""

    convolution: Convolution
    in_float32: bool
    """The layer itself computes this shape in float32."""
    error: float
    """Largest error of its outputs and gradients, relative to the largest value of each."""
    faults: tuple[str, ...]
    """What is wrong; empty if nothing is."""


def convolutions(
    options: NetworkOptions, num_classes: int, patch: tuple[int, int, int], channels: int = 1
) -> list[Convolution]:
    """The distinct convolutions that the two networks compute on a patch.

    Raises:
        ValueError: there are no such networks, or they do not take this patch.
    """
    network: Any
    networks = build_networks(options, num_classes, channels)
    if any(size < 1 or size % factor for size, factor in zip(patch, options.factors, strict=True)):
        by_axis = f"the axes of a patch must be multiples of {', '.join(map(str, options.factors))}"
        by_all = f"each axis of a patch must be a multiple of {options.factors[0]}"
        raise ValueError(by_all if len({*options.factors}) == 1 else by_axis)
    images = torch.zeros(()).expand(PATCHES, channels, *patch)  # which take no memory
    small = [2 * factor for factor in options.factors]  # of the networks' input; its grids are scaled to the patch's
    found: dict[tuple[object, ...], Convolution] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv3d | nn.ConvTranspose3d)
        x, y, z = (n * size // edge for n, size, edge in zip(inputs[0].shape[2:], patch, small, strict=True))
        values = max(inputs[0].numel(), output.numel()) * math.prod(patch) // math.prod(small)
        folds = own and options.norm != "instance" and module.bias is None
        key = type(module), module.extra_repr(), (x, y, z), inputs[0].requires_grad, folds
        found.setdefault(
            key, Convolution(module, (x, y, z), values, inputs[0].requires_grad, evaluation_patches, folds)
        )

    for network in networks:
        own = isinstance(network, EncoderDecoder)  # those of MONAI fold nothing, and take all patches at once
        evaluation_patches = 1 if own and network.eval().goes_patch_by_patch(images) else PATCHES
        network.train()
        layers = [module for module in network.modules() if isinstance(module, nn.Conv3d | nn.ConvTranspose3d)]
        handles = [layer.register_forward_hook(note) for layer in layers]
        network(torch.zeros(1, channels, *small))
        for handle in handles:
            handle.remove()
    return list(found.values())


def compare(convolution: Convolution, device: torch.device) -> Comparison:
    """Computes outputs and gradients in bfloat16, twice, and in float32 from the same numbers."""
    random = torch.Generator(device).manual_seed(0)
    module: Any = copy.deepcopy(convolution.module)
    module.to(device, memory_format=torch.channels_last_3d)  # torch's stubs lack the argument
    parameters = dict(module.named_parameters())
    for values in parameters.values():
        values.data.normal_(generator=random).copy_(values.data.bfloat16())

    def channels_last(shape: tuple[int, ...]) -> Tensor:
        n, c, *grid = shape
        return torch.randn(n, *grid, c, generator=random, device=device).bfloat16().movedim(-1, 1)

    def compute(x: Tensor, gradient: Tensor | None, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
        x = x.requires_grad_(convolution.input_gradient)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            output = module.forward(x)  # without the hooks of an adapter
        gradient = channels_last(tuple(output.shape)) if gradient is None else gradient
        inputs = ([x] if convolution.input_gradient else []) + list(parameters.values())
        return gradient, output.detach(), *torch.autograd.grad(output, inputs, gradient.to(output.dtype))

    names = ["output", *(["input gradient"] if convolution.input_gradient else [])]
    names += [f"{name} gradient" for name in parameters]
    x = channels_last(convolution.input_shape)
    gradient, *expected = compute(x.float(), None, None)
    runs = []
    for _ in range(2):
        _fill_free_memory(device)
        runs.append(compute(x.detach(), gradient, torch.bfloat16)[1:])
    if convolution.folds:
        names.append("output in evaluation")
        *both, truth = evaluate(convolution, module, x, random)
        runs = [(*run, output) for run, output in zip(runs, both, strict=True)]
        expected.append(truth)
    faults, largest = [], 0.0
    for name, truth, one, other in zip(names, expected, *runs, strict=True):
        errors = [_relative_error(result, truth) for result in (one, other)]
        error = max(errors, key=lambda value: math.inf if math.isnan(value) else value)
        largest = max(largest, error)
        if not math.isfinite(error):
            faults.append(f"{name} not finite")
        elif error > TOLERANCE:
            faults.append(f"{name} off by {error:.2g} times its largest value")
        elif device.type == "cpu" and not torch.equal(one, other):  # on a GPU, sums may depend on the order of blocks
            faults.append(f"{name} differs from one time to the next")
    return Comparison(convolution, runs[0][0].dtype == torch.float32, largest, tuple(faults))


def evaluate(convolution: Convolution, module: Any, x: Tensor, random: torch.Generator) -> list[Tensor]:
    """The output with batch normalisation and, where one can be, a residual: folded in bfloat16, twice; in float32."""
    norm = NormAct(module.out_channels).to(x.device).eval()
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
        norm.running_mean.normal_(generator=random)
        norm.running_var.uniform_(0.5, 2, generator=random)
        x = x[: convolution.evaluation_patches]
        residual = x.flip(2) if module.in_channels == module.out_channels and set(module.stride) == {1} else None
        results = []
        for _ in range(2):
            _fill_free_memory(x.device)
            with torch.autocast(x.device.type, torch.bfloat16):
                results.append(convolve_folded(module, norm, x, residual))
        with torch.autocast(x.device.type, enabled=False):
            truth = norm(module(x.float()), residual=None if residual is None else residual.float())
    return [*results, truth]


def _relative_error(result: Tensor, truth: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float(torch.linalg.vector_norm(result - truth, math.inf) / torch.linalg.vector_norm(truth, math.inf))


def _fill_free_memory(device: torch.device) -> None:
    """Makes the memory that is allocated next hold NaN, so that a kernel that reads it before writing is noticed."""
    sizes = [2**n for n in range(5, 22)]
    blocks = [torch.full((size,), math.nan, dtype=torch.bfloat16, device=device) for size in sizes for _ in range(2)]
    del blocks


def _times(sizes: Iterable[int]) -> str:
    return "x".join(map(str, sizes))
