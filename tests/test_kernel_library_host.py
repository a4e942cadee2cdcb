"""csrc/host.cpp: what C++ says of the processor, of its compiler, and of the constants that Python repeats."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

import sslfast.ops  # noqa: F401  (declares every op)
from sslfast.kernel_library import host_isa, host_module
from sslfast.ops import flags
from sslfast.ops.check import MAX_CLASSES
from sslfast.ops.sums import SumsOp


@pytest.fixture(scope="module")
def host() -> ModuleType:
    return host_module()


def test_it_agrees_with_torch_about_the_processor(host: ModuleType) -> None:
    assert host.build_facts()["vector_bits"] == {"avx512": 512, "avx2": 256, "baseline": 128}[host_isa()]
    assert ("avx512bf16" in host.cpu_features()) == torch.cpu._is_avx512_bf16_supported()


def test_no_product_is_fused_with_a_sum(host: ModuleType) -> None:
    assert not host.build_facts()["contracts"]


def test_python_repeats_the_constants_of_the_kernels(host: ModuleType) -> None:
    ops = [op for module in list(sys.modules.values()) if isinstance(op := getattr(module, "OP", None), SumsOp)]
    assert ops
    layouts = {
        op.name: {"maps": len(op.maps), "students": op.students, "scalars": op.scalars, "rows": op.rows} for op in ops
    }
    constants = {"MAX_CLASSES": MAX_CLASSES, "CLASS": flags.CLASS, "RELIABLE": flags.RELIABLE}
    assert host.constants() == {**constants, **layouts}
