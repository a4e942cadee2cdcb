"""Normalisation with residual, ReLU and skip: against float64, torch's modules, and itself in other layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.compare import ROUNDING, with_threads
from helpers.maps import DTYPES, layouts, random_map
from helpers.options import TARGET, kernels_and_reference, not_on, on_every_backend, only_on, some
from sslfast.ops import norm_act
from sslfast.ops.backend import backend

pytestmark = on_every_backend

SIZES = some([(7, 3, 5), (33,), (1, 1, 1), (5, 31), (16, 16, 17), (20, 21, 41)], 3)
WIDTHS = some([1, 2, 3, 8, 16, 24, 64, 100, 256], 3)
GRADIENT_OF_X = 2  # its place in what `compute` gives
EPS = 1e-5  # the default
groups = pytest.mark.parametrize("per_volume", [False, True])
FORMS = {
    "relu": {},
    "residual": {"residual": True},
    "skip": {"skip": True},
    "residual and skip, no relu": {"residual": True, "skip": True, "relu": False},
}
forms = pytest.mark.parametrize("form", FORMS)


def compute(form: str = "relu", **options: Any) -> Callable[..., list[Tensor]]:
    """Values, statistics and gradients of x, then residual and skip as the form has them, then weight and bias.

    The gradient of the values is the same small whole numbers in every dtype.
    """
    chosen = {"relu": True, **FORMS[form]}

    def run(x: Tensor, *others: Tensor) -> list[Tensor]:
        leaves = [m.detach().requires_grad_() for m in (x, *others)]
        *maps, weight, bias = leaves[1:]
        named = dict(zip([name for name in ("residual", "skip") if chosen.get(name)], maps, strict=True))
        result = norm_act(leaves[0], weight, bias, relu=chosen["relu"], **named, **options)
        upstream = (torch.arange(x.numel()) % 7 - 3.0).to(x.dtype).view(x.shape)
        return [result.values.detach(), result.statistics, *torch.autograd.grad(result.values, leaves, upstream)]

    return run


def in_float64(call: Callable[..., list[Tensor]], maps: list[Tensor]) -> list[Tensor]:
    """The specification on the same numbers."""
    with backend("reference"):
        return call(*(m.double() for m in maps))


def assert_close(mine: list[Tensor], exact: list[Tensor], rounding: float = 0.0) -> None:
    """Within float32's rounding of the largest value, and the dtype's rounding of each.

    The gradient of x is a difference times 1 / the standard deviation, and so is its rounding: a volume of one voxel
    has neither.
    """
    deviation = (exact[1][:, 1] + EPS).sqrt()
    for i, (ours, truth) in enumerate(zip(mine, exact, strict=True)):
        scale = max(float(truth.abs().max()), 1.0) if truth.numel() else 1.0
        scale = max(scale, float(1 / deviation.min())) if i == GRADIENT_OF_X else scale
        torch.testing.assert_close(ours.double(), truth.double(), rtol=rounding, atol=1e-5 * scale)


def inputs(form: str, volumes: int, channels: int, size: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Maps of the form, and parameters such that rounding does not decide the sign of what the ReLU gets."""
    while True:
        count = 1 + sum(name in FORMS[form] for name in ("residual", "skip"))
        maps = [torch.randn(volumes, channels, *size).to(dtype) for _ in range(count)]
        result = [*maps, torch.rand(channels) + 0.5, torch.randn(channels)]
        if not FORMS[form].get("relu", True) or maps[0].numel() > 2**14:
            return result
        without = [m for i, m in enumerate(result) if i or form != "skip"]
        z = [norm_act_before_relu(form, without, per_volume) for per_volume in (False, True)]
        if min(float(values.abs().min()) for values in z) > 1e-5:
            return result


def norm_act_before_relu(form: str, maps: list[Tensor], per_volume: bool) -> Tensor:
    x, *others, weight, bias = (m.double() for m in maps)
    residual = others[0] if form == "residual" else None
    with backend("reference"):
        return norm_act(x, weight, bias, per_volume=per_volume, relu=False, residual=residual).values


@groups
@forms
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients_are_those_of_the_specification(
    size: tuple[int, ...], dtype: torch.dtype, form: str, per_volume: bool
) -> None:
    form = form if size != (20, 21, 41) else "residual and skip, no relu"
    maps = inputs(form, 2, 3, size, dtype)
    call = compute(form, per_volume=per_volume)
    assert_close(call(*maps), in_float64(call, maps), ROUNDING[dtype])


@groups
@pytest.mark.parametrize("width", WIDTHS)
def test_any_number_of_channels(width: int, per_volume: bool) -> None:
    maps = inputs("residual", 2, width, (5, 3, 4), torch.float32)
    call = compute("residual", per_volume=per_volume)
    assert_close(call(*maps), in_float64(call, maps))


@groups
@forms
@pytest.mark.parametrize("dtype", some(DTYPES, 1))
def test_every_layout_gives_the_same(dtype: torch.dtype, form: str, per_volume: bool) -> None:
    *maps, weight, bias = inputs(form, 3, 20, (5, 6, 7), dtype)
    call = compute(form, per_volume=per_volume)
    plain = call(*maps, weight, bias)
    for name in layouts(maps[0]):
        changed = [layouts(m)[name] for m in maps]
        assert_close(call(*changed, weight, bias), plain, 2 * ROUNDING[dtype])  # sums are added up in another order
        for mine, other in zip(call(maps[0], *changed[1:], weight, bias), plain, strict=True):
            assert torch.equal(mine, other), name


@only_on("cpu", "cuda-emulated")
@groups
@pytest.mark.parametrize("last", [False, True])
def test_bits_do_not_depend_on_threads(last: bool, per_volume: bool) -> None:
    *maps, weight, bias = inputs("residual and skip, no relu", 2, 16, (40, 41, 13), torch.bfloat16)
    maps = [layouts(m)["channels last"] if last else m for m in maps]
    call = compute("residual and skip, no relu", per_volume=per_volume)
    one, three, seven = with_threads(lambda: call(*maps, weight, bias), 1, 3, 7)
    for a, b, c in zip(one, three, seven, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@kernels_and_reference()
@pytest.mark.parametrize("last", [False, True])
def test_it_is_batch_norm_and_instance_norm(name: str, last: bool) -> None:
    x, residual, skip = (torch.randn(3, 6, 4, 5, 7) for _ in range(3))
    if last:
        x = x.to(memory_format=torch.channels_last_3d)
    weight, bias = torch.randn(6), torch.randn(6)
    with backend(name):
        batch = norm_act(x, weight, bias, residual=residual, skip=skip)
        instance = norm_act(x, weight, bias, per_volume=True)
        statistics = torch.stack((bias, weight.abs())).unsqueeze(0).double()
        evaluated = norm_act(x, weight, bias, statistics=statistics, relu=False)
    expected = (F.batch_norm(x, None, None, weight, bias, training=True) + residual).relu() + skip
    torch.testing.assert_close(batch.values, expected, rtol=1e-4, atol=1e-5)
    assert batch.size == 3 * 4 * 5 * 7
    expected = F.instance_norm(x, weight=weight, bias=bias).relu()
    torch.testing.assert_close(instance.values, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(evaluated.values, F.batch_norm(x, bias, weight.abs(), weight, bias))
    assert batch.values.stride() == x.stride()
    mean, variance = batch.statistics[0]
    torch.testing.assert_close(mean, x.double().mean((0, 2, 3, 4)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(variance, x.double().var((0, 2, 3, 4), correction=0), rtol=1e-5, atol=1e-6)


@groups
@pytest.mark.parametrize("last", [False, True])
def test_a_large_offset_cancels(last: bool, per_volume: bool) -> None:
    x = torch.randn(2, 5, 12, 13, 11) + torch.tensor([1e4, -1e4, 3e3, 1.0, 0.0]).view(5, 1, 1, 1)
    x = layouts(x)["channels last"] if last else x
    full = [x, torch.zeros_like(x), torch.zeros_like(x), torch.ones(5), torch.zeros(5)]
    call = compute("residual and skip, no relu", per_volume=per_volume)
    assert_close(call(*full), in_float64(call, full))


@groups
@pytest.mark.parametrize("last", [False, True])
def test_an_outlier_at_the_first_voxel_costs_no_digits(last: bool, per_volume: bool) -> None:
    x = torch.randn(2, 3, 12, 13, 11)
    x[:, :, 0, 0, 0] = 1e4
    x = layouts(x)["channels last"] if last else x
    statistics = norm_act(x, torch.ones(3), torch.zeros(3), per_volume=per_volume).statistics
    over = (2, 3, 4) if per_volume else (0, 2, 3, 4)
    variance = x.double().var(over, correction=0).view(-1, 3)
    torch.testing.assert_close(statistics[:, 1], variance, rtol=1e-5, atol=0)


@kernels_and_reference()
@groups
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 4, 5)])
def test_a_constant_channel_becomes_its_bias_without_gradient(
    name: str, size: tuple[int, ...], per_volume: bool
) -> None:
    x = torch.full((2 if per_volume else 1, 3, *size), 7.25, requires_grad=True)
    bias = torch.tensor([1.0, 2.0, -3.0])
    with backend(name):
        y = norm_act(x, torch.ones(3), bias, per_volume=per_volume).values
        y.backward(torch.full_like(y, 3.0))
    assert torch.equal(y, bias.relu().view(3, *(1 for _ in size)).expand_as(y))
    assert float(x.grad.abs().max()) <= (1e-3 if name == "reference" else 0)


@kernels_and_reference()
def test_nan_reaches_its_channel_alone(name: str) -> None:
    x = torch.randn(2, 3, 4, 5, 6)
    x[1, 1, 2, 3, 4] = torch.nan
    with backend(name):
        y = norm_act(x, torch.ones(3), torch.zeros(3)).values
    assert y[:, 1].isnan().all()
    assert y[:, ::2].isfinite().all()


@kernels_and_reference()
@groups
def test_an_empty_batch_has_empty_values(name: str, per_volume: bool) -> None:
    x = torch.zeros(0, 3, 4, 5, 6, requires_grad=True)
    weight = torch.ones(3, requires_grad=True)
    with backend(name):
        result = norm_act(x, weight, torch.zeros(3), per_volume=per_volume)
        result.values.sum().backward()
    assert result.values.shape == x.shape
    assert not weight.grad.any()


@pytest.mark.parametrize("given", [False, True])
@groups
def test_gradients_are_those_of_finite_differences(per_volume: bool, given: bool) -> None:
    maps = [torch.randn(2, 3, 3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    parameters = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    statistics = torch.rand(2, 2, 3, dtype=torch.float64) if given else None

    def call(x: Tensor, residual: Tensor, skip: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        named: dict[str, Any] = {"residual": residual, "skip": skip, "statistics": statistics}
        return norm_act(x, weight, bias, per_volume=per_volume, **named).values

    with backend("reference"):
        assert torch.autograd.gradcheck(call, (*maps, *parameters))


@groups
def test_given_statistics_are_constants(per_volume: bool) -> None:
    maps = inputs("residual and skip, no relu", 2, 3, (4, 5, 6), torch.float32)
    statistics = torch.rand(2 if per_volume else 1, 2, 3, dtype=torch.float64)
    call = compute("residual and skip, no relu", statistics=statistics)
    assert_close(call(*maps), in_float64(call, maps))


@not_on("reference")
def test_the_backend_may_change_before_the_backward_pass() -> None:
    x = torch.randn(2, 3, 4, 5, 6, requires_grad=True)
    values = norm_act(x, torch.ones(3), torch.zeros(3)).values
    with backend("reference"):
        values.sum().backward()
    assert x.grad.isfinite().all()


@not_on("reference", "triton-interpreted")
def test_it_compiles_without_graph_breaks() -> None:
    maps = inputs("residual", 2, 4, (4, 5, 6), torch.float32)
    leaves = [m.requires_grad_() for m in maps]

    def forward(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return norm_act(x, weight, bias, residual=residual)[:2]

    compiled = torch.compile(forward, fullgraph=True)
    for mine, eager in zip(compiled(*leaves), forward(*leaves), strict=True):
        torch.testing.assert_close(mine, eager)
    gradients = (torch.autograd.grad(run(*leaves)[0].sum(), leaves) for run in (compiled, forward))
    for mine, eager in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, eager)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_parameters_of_every_dtype_and_layout_give_the_same(dtype: torch.dtype) -> None:
    x, weight, bias = random_map(2, 3, (5, 3, 4)), torch.tensor([0.5, 2, -1]), torch.tensor([0.25, -3, 0])
    expected = norm_act(x, weight, bias).values
    parameters = [torch.stack((v, v + 9), 1).to(dtype)[:, 0].requires_grad_() for v in (weight, bias)]
    found = norm_act(x, *parameters).values
    assert torch.equal(found, expected)
    found.sum().backward()
    assert {p.grad.dtype for p in parameters} == {dtype}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3)}, "x has shape"),
        ({"x": torch.zeros(2, 3, 4, dtype=torch.int64)}, "x has dtype"),
        ({"weight": torch.ones(2)}, "weight has shape"),
        ({"bias": torch.ones(3, 1)}, "bias has shape"),
        ({"statistics": torch.ones(3, 2, 3)}, "statistics has shape"),
        ({"residual": torch.zeros(2, 3, 5)}, "residual has shape"),
        ({"skip": torch.zeros(2, 3, 4, dtype=torch.float16)}, "skip has dtype"),
        ({"eps": 0.0}, "eps is 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_argument_is_named(change: dict[str, Any], message: str) -> None:
    arguments = {"x": torch.zeros(2, 3, 4), "weight": torch.ones(3), "bias": torch.zeros(3), **change}
    moved = {k: v.to(TARGET.device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with pytest.raises((ValueError, TypeError), match=message):
        norm_act(**moved)
