"""Compiles every kernel for a GPU that need not be there, and counts the registers and spilled bytes of a thread.

python -m benchmarks.registers triton 80 90 100      # compute capabilities
python -m benchmarks.registers cuda 80 90 100
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.report import markdown
from sslfast.kernel_library import CUDA_FLAGS, find_nvcc

ROOT = Path(__file__).parent.parent
CASES = [(2, 16, torch.float32), (2, 16, torch.bfloat16), (14, 64, torch.float32), (32, 64, torch.float16)]


class Usage(NamedTuple):
    """The most that any variant of a kernel takes."""

    variants: int
    registers: int
    spilled: int  # bytes


@contextmanager
def compiled_only(capability: int) -> Iterator[dict[tuple[str, str], Any]]:
    """Within the block every launch compiles and nothing runs; gives Triton's kernels by name and variant."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class AbsentGPU:
        """What Triton asks of its driver when it compiles and does not launch."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return capability  # Triton keeps what it has compiled by device

        def get_current_stream(self, device: int) -> int:
            return 0

    kernels: dict[tuple[str, str], Any] = {}
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        name = f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}"
        kernels[name, kernel.hash] = kernel
        return kernel

    driver.set_active(AbsentGPU())  # stays: this process has no GPU to go back to
    JITFunction.run = compile_only
    try:
        yield kernels
    finally:
        JITFunction.run = launch


def call_every_op(
    classes: int, width: int, dtype: torch.dtype, size: tuple[int, ...] = (2, 8, 16, 16), quota: int = 256
) -> None:
    """Each of Triton's once, as the dispatcher does; what they compute is not looked at."""
    from sslfast.kernels import IMPLEMENTATIONS

    ops = IMPLEMENTATIONS
    logits, features = (torch.zeros(size[0], c, *size[1:]).to(dtype) for c in (classes, width))
    labels, step, percentile = torch.zeros(size).long(), torch.zeros(()).long(), torch.tensor(80.0).double()
    to = torch.empty_like(logits), None

    def forward_and_backward(name: str, maps: int, students: int, *rest: object) -> None:
        arguments = (*(maps * (logits, None)), *rest)
        sums = ops[name](*arguments)
        ops[f"{name}_backward"](sums, *arguments, *(students * to))

    forward_and_backward("dual_supervised", 2, 2, labels, 0.6, -1)
    ops["voxel_entropy"](logits, None)
    flags: Tensor = ops["reliability"](logits, None, percentile, None)[1]
    forward_and_backward("pseudo_supervised", 1, 1, flags)
    forward_and_backward("rectified_consistency", 2, 1, flags)
    forward_and_backward("masked_consistency", 2, 1, 0.5, 1.0)
    ops["class_prototypes"](features, flags, classes, features, step)
    prototypes, members = ops["class_prototypes"](features, flags, classes)
    for negatives in (False, True):
        indices, counts = ops["sample_voxels"](flags, [quota] * classes, 1, step, negatives)
    indices = torch.zeros_like(indices)
    rows = ops["gather_voxels"](features, indices)
    ops["gather_voxels_backward"](rows, indices, torch.empty_like(features))
    keys = rows, counts, prototypes, members, rows, counts, 0.1
    sums, lse = ops["voxel_infonce"](*keys)
    ops["voxel_infonce_backward"](sums, lse, *keys)
    for x in (features, features.movedim(1, -1).contiguous().movedim(-1, 1)):
        call_norm_ops(x)


def call_norm_ops(x: Tensor) -> None:
    """Those of `norm_act` with and without a ReLU, a residual and a skip."""
    from sslfast.kernels import IMPLEMENTATIONS

    ops = IMPLEMENTATIONS
    affine, y = 2 * (torch.zeros(x.shape[1]),), torch.empty_like(x)
    for per_volume, relu, other in ((False, True, None), (False, True, x), (True, False, None)):
        statistics = ops["norm_statistics"](x, per_volume)
        arguments = x, statistics, *affine, 1e-5, relu, other
        ops["norm_apply"](*arguments, other, y)
        sums = ops["norm_backward_sums"](x, *arguments)
        ops["norm_backward"](x, *arguments, sums, y, other)


def triton_usage(capability: int) -> dict[str, Usage]:
    """Registers and spills of every Triton kernel, by name."""
    with compiled_only(capability) as kernels:
        for classes, width, dtype in CASES:
            call_every_op(classes, width, dtype, (2, 96, 96, 80))  # several blocks for each program
        call_every_op(2, 16, torch.float32)
        for size in ((1, 1, 1, 1), (1, 4, 4, 4), (3, 1, 1, 1)):  # a number of 1 is compiled as a constant
            call_every_op(2, 1, torch.float32, size, quota=1)
    kernel_usage: dict[str, Usage] = {}
    for (name, _), kernel in kernels.items():
        registers, spilled = _resources(kernel.asm["cubin"])
        before = kernel_usage.get(name, Usage(0, 0, 0))
        kernel_usage[name] = Usage(before.variants + 1, max(before.registers, registers), max(before.spilled, spilled))
    return kernel_usage


def _resources(binary: bytes) -> tuple[int, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    line = next(line for line in report.splitlines() if "REG:" in line)
    values = dict(part.split(":", 1) for part in line.split() if ":" in part)
    return int(values["REG"]), int(values["STACK"]) + int(values.get("LOCAL", 0))


PTXAS = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


KERNEL = re.compile(r"([a-z_]+_kernel)(?:I\w*?Li(\d+)E)?")  # within a mangled name


def cuda_usage(capability: int) -> dict[str, Usage]:
    """Registers and spills of every CUDA kernel; in angle brackets the classes that it has room for."""
    command = [str(find_nvcc()), *CUDA_FLAGS, f"-arch=sm_{capability}", "-cubin", "-Xptxas=-v"]

    def compiled(source: Path) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            result = subprocess.run(
                [*command, str(source), "-o", file.name], capture_output=True, text=True, check=False
            )
        if result.returncode:
            raise SystemExit(result.stderr)
        return result.stderr

    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(compiled, sources))
    kernel_usage: dict[str, Usage] = {}
    for source, report in zip(sources, reports, strict=True):
        for kernel in PTXAS.finditer(report):
            function, classes = KERNEL.findall(kernel["name"])[0]
            name = f"{source.stem}.{function}" + (f"<{classes}>" if classes else "")
            kernel_usage[name] = Usage(1, int(kernel["registers"]), int(kernel["stores"]) + int(kernel["loads"]))
    return kernel_usage


def main() -> None:
    """Prints a table for each compute capability."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", choices=["triton", "cuda"], help="whose kernels")
    parser.add_argument("capabilities", nargs="+", type=int, help="compute capabilities: 90 is an H100's and H200's")
    arguments = parser.parse_args()
    usage = {"triton": triton_usage, "cuda": cuda_usage}[arguments.backend]
    for capability in arguments.capabilities:
        print(f"\nsm_{capability}\n")
        rows = [(f"`{name}`", *map(str, numbers)) for name, numbers in usage(capability).items()]
        print(*markdown(("kernel", "variants", "registers", "spilled bytes"), rows), sep="\n")


if __name__ == "__main__":
    main()
