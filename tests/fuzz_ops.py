"""Ops on any input that hypothesis thinks of, against the reference: python tests/fuzz_ops.py --help."""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import options

options.choose("cpu", 0)  # before a helper is imported that depends on it

from helpers.compare import ROUNDING, SMALLEST, with_gradients
from helpers.maps import DTYPES, clear_threshold, layouts, limit_between, random_flags, random_map
from sslfast import ops
from sslfast.losses import PRESETS, DualContrastiveLoss
from sslfast.ops.backend import backend
from sslfast.ops.flags import RELIABLE
from sslfast.ops.reliability import voxel_entropy_ref

LABELS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
LAYOUTS = ["contiguous", "expanded", *layouts(torch.zeros(1, 1, 1, 1))]
HOSTILE = [math.nan, math.inf, -math.inf, 1e30, -1e30, 1e-42, 0.0]
MAPS = {
    "dual_supervised": 2,
    "rectified_consistency": 2,
    "masked_consistency": 2,
    "norm_act": 2,
    "loss": 4,
}  # others: 1
OPS = [*MAPS, "pseudo_supervised", "reliability", "class_prototypes", "sample_voxels", "gather_voxels", "voxel_infonce"]


@dataclass(frozen=True)
class Case:
    """A call of an op. Its numbers come from the seed."""

    op: str
    seed: int = 0
    volumes: int = 2
    channels: int = 3  # classes, or channels of features
    size: tuple[int, ...] = (3, 4, 5)
    dtype: torch.dtype = torch.float32
    layouts: tuple[str, ...] = ("contiguous",) * 4
    hostile: tuple[tuple[int, float], ...] = ()  # a map, and what stands at one of its places
    labels: torch.dtype = torch.int64
    ignore: int = -1
    wrong: int | None = None  # a label, flags, an index or a count that may be out of range
    choice: int = 0  # of the op's options

    def maps(self) -> list[Tensor]:
        """The maps [N, channels, *spatial]."""
        torch.manual_seed(self.seed)
        made = [random_map(self.volumes, self.channels, self.size, self.dtype) for _ in range(MAPS.get(self.op, 1))]
        for number, value in self.hostile:
            flat = made[number % len(made)].view(-1)
            if len(flat):
                limit = torch.finfo(self.dtype).max / (8 if self.op == "norm_act" else 1)  # which adds them up
                if self.op == "loss" and number > 1:  # features: their squares, which float32 must hold
                    limit = min(limit, 1e18)
                flat[int(torch.randint(len(flat), ()))] = (
                    min(max(value, -limit), limit) if math.isfinite(value) else value
                )
        return [laid_out(values, layout) for values, layout in zip(made, self.layouts, strict=False)]

    def flags(self) -> Tensor:
        """Flags of the classes, of which one may be wrong."""
        flags = random_flags(self.volumes, self.channels, self.size)
        if self.wrong is not None and flags.numel():
            flags.view(-1)[int(torch.randint(flags.numel(), ()))] = self.wrong % 256
        return self.apart(flags)

    def apart(self, values: Tensor) -> Tensor:
        """The integers as they are, or with others between them."""
        return values if self.layouts[-1] == "contiguous" else torch.stack((values, 0 * values + 99), -1)[..., 0]


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The map in a layout; "expanded" repeats its first voxel along the last axis."""
    if layout == "contiguous":
        return values
    if layout == "expanded":
        return values[..., :1].expand(values.shape)
    return layouts(values)[layout]


def calls(case: Case, maps: Sequence[Tensor]) -> Callable[..., list[Tensor]]:
    """What an op makes of maps; choices that rounding could decide are made by these."""
    known = [torch.nan_to_num(m, 0, 0, 0) for m in maps]
    torch.manual_seed(case.seed + 1)
    match case.op:
        case "dual_supervised":
            labels = torch.randint(0, case.channels, (case.volumes, *case.size))
            if case.wrong is not None and labels.numel():
                labels.view(-1)[int(torch.randint(labels.numel(), ()))] = case.wrong
            labels = case.apart(labels.to(case.labels))  # which wraps a wrong one that does not fit
            weights = torch.rand(2, case.channels) if case.choice % 2 else None
            over: Any = ("mask", "labelled")[case.choice // 2 % 2]
            confidences = torch.cat([z.double().softmax(1).amax(1).flatten() for z in known])
            threshold = away_from(confidences, lambda: clear_threshold(*known), 0.0)

            def supervised(a: Tensor, b: Tensor) -> list[Tensor]:
                more = {"class_weights": weights, "discrepancy_over": over, "ignore_index": case.ignore}
                return [*ops.dual_supervised(a, b, labels, threshold=threshold, **more)]

            return supervised
        case "pseudo_supervised":
            flags = case.flags()
            return lambda z: [*ops.pseudo_supervised(z, flags)]
        case "rectified_consistency":
            flags = case.flags()
            return lambda p, q: [*ops.rectified_consistency(p, q, flags)]
        case "masked_consistency":
            entropies = voxel_entropy_ref(known[1].double()).flatten()
            limit = away_from(entropies, lambda: limit_between(known[1]), math.inf) if case.choice % 2 else math.inf
            return lambda p, q: [*ops.masked_consistency(p, q, max_entropy=limit)]
        case "class_prototypes":
            flags, classes = case.flags(), 2 + case.choice % 5
            return lambda f: [*ops.class_prototypes(f, flags, classes)]
        case "gather_voxels":
            indices = torch.randint(-1, max(case.volumes * math.prod(case.size), 1), (3, 5))
            indices[1, 2] = -1 if case.wrong is None else case.wrong
            if not maps[0].numel():
                indices.fill_(-1 if case.wrong is None else case.wrong)
            indices = case.apart(indices)
            return lambda f: [ops.gather_voxels(f, indices)]
        case "voxel_infonce":
            classes, rows, keys = 2 + case.choice % 3, case.choice % 4, case.choice // 4 % 7
            counts = [torch.randint(0, most + 1, (classes,)) for most in (rows, 3, keys)]
            if case.wrong is not None:
                counts[case.choice % 3][1] = case.wrong
            counts = [case.apart(c.to(case.labels)) for c in counts]
            voxels = torch.randint(max(case.volumes * math.prod(case.size), 1), (classes, 1 + rows + keys))

            def contrast(f: Tensor) -> list[Tensor]:
                flat = f.movedim(1, -1).flatten(0, -2)
                some = flat[voxels] if len(flat) else f.new_zeros(*voxels.shape, case.channels) + f.sum()
                anchors, negatives = some[:, 1 : 1 + rows], some[:, 1 + rows :]
                return [*ops.voxel_infonce(anchors, counts[0], some[:, 0], counts[1], negatives, counts[2])]

            return contrast
        case "norm_act":
            weight, bias = torch.randn(2, case.channels)
            per_volume, relu = bool(case.choice % 2), bool(case.choice // 2 % 2)
            other = case.choice // 4 % 4
            return lambda x, y: [
                ops.norm_act(
                    x, weight, bias, per_volume=per_volume, relu=relu, residual=y if other & 1 else None,
                    skip=y if other & 2 else None,
                ).values
            ]  # fmt: skip
    raise ValueError(case.op)


def away_from(values: Tensor, choose: Callable[[], float], else_: float) -> float:
    """A limit that none of the values is so close to that rounding decides on which side it is."""
    chosen = choose() if values.numel() else else_
    return chosen if bool(((values - chosen).abs() > 1e-5).all()) else else_


def check(case: Case) -> None:
    """Runs a case on the C++ kernels and on the reference, and compares values, gradients and errors."""
    maps = case.maps()
    if case.op == "sample_voxels":
        quotas = [case.choice % 9 + c for c in range(case.channels)]
        flags = case.flags()
        drawn = [ops_with(name, lambda: ops.sample_voxels(flags, quotas, case.seed, case.choice)) for name in BOTH]
        assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))
    elif case.op == "reliability":
        check_reliability(case, maps[0])
    elif case.op == "loss":
        check_loss(case, maps)
    else:
        compute = calls(case, maps)
        ours, exact = outcome(compute, maps, "cpu"), outcome(compute, [m.double() for m in maps], "reference")
        if isinstance(ours, str) or isinstance(exact, str):
            assert ours == exact
        else:
            plain = outcome(compute, [m.float() for m in maps], "reference")
            assert not isinstance(plain, str)
            compare(case, maps, ours, exact, plain)


BOTH = ("cpu", "reference")


def ops_with(name: str, call: Callable[[], Any]) -> Any:
    """The result of a call on a backend."""
    with backend(name):
        return call()


def outcome(compute: Callable[..., list[Tensor]], maps: Sequence[Tensor], name: str) -> list[Tensor] | str:
    """Values and gradients, or the error in words."""
    try:
        with backend(name):
            return with_gradients(compute, *maps)
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


def largest_term(case: Case, maps: Sequence[Tensor]) -> float:
    """About the size of the largest terms that cancel in a gradient."""
    x = maps[0].double()
    if case.op == "voxel_infonce":  # 1 / temperature / length
        lengths = torch.linalg.vector_norm(x, dim=1)
        return 10 / min(lengths[lengths > 1e-12].tolist(), default=1.0)
    if case.op == "norm_act":  # 1 / deviation
        axes = [0, *range(2, x.ndim)][case.choice % 2 :]
        return 10 * float((x.var(axes, correction=0) + 1e-5).rsqrt().nan_to_num(0).max())
    return 1 / max(case.volumes * math.prod(case.size), 1)  # a voxel's share of a mean


def compare(case: Case, maps: Sequence[Tensor], ours: list[Tensor], exact: list[Tensor], plain: list[Tensor]) -> None:
    """|ours - float64| <= 2 |eager float32 - float64| + rounding, in values and, if none of them is NaN, gradients."""
    values = len(ours) - len(maps)
    spoiled = any(bool(value.isnan().any()) for value in exact[:values] if value.is_floating_point())
    for i, (mine, truth, eager) in enumerate(zip(ours, exact, plain, strict=True)):
        assert mine.shape == truth.shape
        if not truth.is_floating_point():
            assert torch.equal(mine, truth)
            continue
        rounding_decides = case.op == "norm_act" and case.choice // 2 % 2  # where the ReLU cuts
        if i >= values and (spoiled or rounding_decides):
            continue
        mine, truth, eager = mine.double(), truth.double(), eager.double()
        assert torch.equal(mine.isnan(), truth.isnan())
        known = truth.isfinite() & mine.isfinite()
        assert torch.equal(mine[~known].nan_to_num(0), truth[~known].nan_to_num(0))
        mine, truth, eager = mine[known], truth[known], eager[known]
        scale = max(float(truth.abs().max()) if truth.numel() else 0.0, 1.0 if i < values else largest_term(case, maps))
        rounding = ROUNDING[torch.float32 if i < values and case.op != "norm_act" else case.dtype]
        in_dtype = i >= values and case.op in ("norm_act", "voxel_infonce")  # what torch adds up or hands down is
        relative = max(rounding, 3e-6) if in_dtype else 3e-6
        bound = 2 * (eager - truth).abs() + rounding * truth.abs() + relative * scale + SMALLEST[case.dtype]
        assert ((mine - truth).abs() <= bound).all()


def check_reliability(case: Case, logits: Tensor) -> None:
    """The threshold is the reference's; flags differ only where an entropy is the threshold but for rounding."""
    percentile = float(case.choice % 101)
    (ours, flags), (exact, expected) = (
        ops_with(name, lambda z=z: ops.reliability(z, percentile)) for name, z in zip(BOTH, (logits, logits.double()))
    )
    assert bool(ours.isnan()) == bool(exact.isnan())
    if not ours.isnan():
        assert abs(float(ours) - float(exact)) <= 1e-6 + 1e-5 * abs(float(exact))
        close = (voxel_entropy_ref(logits.double()) - exact).abs() <= 2e-6 + 1e-5 * exact.abs()
        assert torch.equal(flags & RELIABLE | close * RELIABLE, expected & RELIABLE | close * RELIABLE)
        assert torch.equal(flags & ~RELIABLE, expected & ~RELIABLE)


def check_loss(case: Case, maps: list[Tensor]) -> None:
    """The whole loss is the reference's; it is finite if all numbers are, and NaN if a logit is not and counts."""
    if case.volumes < 2 or not maps[0].numel():
        return
    labels = torch.randint(0, case.channels, (1, *case.size))
    teacher = random_map(case.volumes - 1, case.channels, case.size, case.dtype) if case.choice % 2 else None
    preset = [*PRESETS][case.choice // 2 % len(PRESETS)]
    criterion = DualContrastiveLoss(
        case.channels, preset=preset, contrast_weight=float(case.choice % 3), anchors=5, negatives=7, ramp_steps=1
    ).eval()  # so that all begin with the same averages

    def loss(name: str, dtype: torch.dtype, noise: float = 0.0) -> Tensor:
        inputs = [m.detach().to(dtype) for m in maps]
        if noise:  # which would lose the layouts
            inputs = [m * (1 + noise * torch.randn_like(m)) for m in inputs]
        with backend(name):
            of_teacher = None if teacher is None else teacher.to(dtype)
            return criterion(*(m.requires_grad_() for m in inputs), labels, step=1, teacher=of_teacher).loss

    ours = loss("cpu", case.dtype)
    ours.backward()
    if all(bool(m.isfinite().all()) for m in maps[:2]):
        assert ours.isfinite() or not all(bool(m.isfinite().all()) for m in maps[2:])
        ours, rounding = ours.detach(), 10 * ROUNDING[case.dtype]
        exact = torch.stack([loss("reference", dtype).detach().double() for dtype in (torch.float64, torch.float32)])
        error = (ours - exact).abs().min()
        if error > rounding * (1 + exact[0].abs()):  # which may decide what is confident, reliable or better
            others = torch.stack([loss("reference", torch.float64, rounding).detach() for _ in range(50)])
            assert error <= 2 * (others - exact[0]).abs().max()
    else:
        assert bool(ours.isnan()) == bool(loss("reference", torch.float64).isnan())
        some_do_not_count = preset == "paper" and teacher is not None  # the winner's on unlabelled volumes
        assert ours.isnan() or some_do_not_count


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any case, small."""
    axes = draw(st.integers(1, 3))
    op = draw(st.sampled_from(OPS))
    return Case(
        op=op,
        seed=draw(st.integers(0, 2**31)),
        volumes=draw(st.integers(0 if op not in ("norm_act", "dual_supervised") else 1, 3)),
        channels=draw(st.one_of(st.integers(2, 5), st.integers(2, 32))),
        size=tuple(draw(st.one_of(st.integers(1, 7), st.integers(1, (4200, 70, 17)[axes - 1]))) for _ in range(axes)),
        dtype=draw(st.sampled_from(DTYPES)),
        layouts=tuple(draw(st.sampled_from(LAYOUTS)) for _ in range(4)),
        hostile=tuple(
            draw(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(HOSTILE)), max_size=2))
            if draw(st.booleans())
            else ()
        ),
        labels=draw(st.sampled_from(LABELS)),
        ignore=draw(st.one_of(st.just(-1), st.sampled_from([0, 1, 2, 5, 127, 255, -128, 40000, 2**40]))),
        wrong=draw(
            st.one_of(st.none(), st.none(), st.integers(-3, 40), st.sampled_from([64, 255, 2**31, -(2**62), 2**62]))
        ),
        choice=draw(st.integers(0, 2**16)),
    )


SEEDS = [Case(op) for op in OPS] + [
    Case("gather_voxels", wrong=120),  # past the end: it read and wrote foreign memory
    Case("gather_voxels", wrong=2**62),
    Case("voxel_infonce", wrong=40, choice=3),
    Case("voxel_infonce", wrong=-1, choice=5),
    Case("voxel_infonce", labels=torch.uint8, choice=23),  # its counts were read as int64
    Case("voxel_infonce", hostile=((0, math.inf),), choice=23),  # it gave a finite loss
    Case("pseudo_supervised", wrong=RELIABLE + 3),
    Case("rectified_consistency", wrong=64),
    Case("dual_supervised", labels=torch.uint8, wrong=3),  # it passed as not annotated
    Case("dual_supervised", labels=torch.uint8, wrong=255),
    Case("dual_supervised", hostile=((0, -math.inf),)),
    Case("dual_supervised", hostile=((1, math.nan),), ignore=0),
    Case("class_prototypes", channels=1 + 1, size=(4200,), volumes=1),
    Case("masked_consistency", hostile=((0, math.nan),), choice=1),
    Case("masked_consistency", volumes=1, channels=2, size=(2,), hostile=((0, math.nan),), choice=1),  # gradients
    Case("class_prototypes", volumes=1, channels=2, size=(2,), hostile=((0, math.nan),)),  # it spoiled other classes
    Case("loss", 24324735, channels=2, size=(4,), hostile=((0, math.nan), (0, 1e30)), choice=3),  # counts nowhere
]


def corpus() -> list[Case]:
    """What failed once, and a call of each op, in every dtype and layout."""
    kinds = [(dtype, layout) for dtype in DTYPES for layout in LAYOUTS]
    return [replace(case, dtype=dtype, layouts=(layout,) * 4) for case in SEEDS for dtype, layout in kinds]


def sanitized(*flags: str) -> int:
    """The exit status of this program with kernels that the sanitizers watch, which must be loaded before Python."""
    runtimes = [  # libstdc++ too: the sanitizer looks up at once what throws exceptions
        subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    watched = "-fsanitize=address,undefined -fno-sanitize=null,object-size,vptr -fno-sanitize-recover=undefined"
    environment = {  # what is left out, the address sanitizer sees; with calls of its checks gcc takes half as long
        "SSLFAST_CXXFLAGS": f"{watched} -O1 -g1 --param asan-instrumentation-with-call-threshold=0",
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait for so small a call cost more than it does
        "CXX": "c++",
    }
    return subprocess.run([sys.executable, __file__, *flags], env={**os.environ, **environment}, check=False).returncode


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if a case fails; hypothesis then prints the smallest that it finds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=2000, help="cases after those of the corpus (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of hypothesis (default: 0)")
    parser.add_argument("--sanitize", action="store_true", help="with address and undefined-behaviour sanitizers")
    flags = parser.parse_args(argv)
    if flags.sanitize:
        return sanitized("--examples", str(flags.examples), "--seed", str(flags.seed))
    torch.set_num_threads(2)
    for case in corpus():
        check(case)
    phases = (Phase.generate, Phase.shrink)
    run = settings(
        max_examples=flags.examples,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )(given(cases())(check))
    seed(flags.seed)(run)()
    print(f"{len(corpus())} cases of the corpus and {flags.examples} others: the same as the reference")
    return 0


if __name__ == "__main__":
    sys.exit(main())
