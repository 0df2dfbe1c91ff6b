"""The kernels of dense divergences where there is no GPU: in Triton's interpreter, and compiled for GPUs elsewhere."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from lightning_kd.losses import _triton  # noqa: E402


@pytest.mark.slow
def test_the_kernels_tests_in_the_interpreter() -> None:
    # a process of its own: Triton decides at its import whether it compiles
    file = Path(__file__).with_name("test_triton.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    alone = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    made = subprocess.run(command, env=alone, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
    assert re.search(r"\b\d\d+ passed in", made.stdout), made.stdout


class Compiled:
    """Stands for a kernel: what would be launched is compiled, as for arguments of these types and divisors."""

    def __init__(self, kernel: Any, capability: int) -> None:
        self.kernel = kernel
        self.capability = capability
        self.made: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(0 < size < limit for size, limit in zip(grid, (2**31, 2**16), strict=True))
        return self.compile

    def compile(self, *given: Any, **named: Any) -> None:
        options = {name: named.pop(name) for name in ("num_warps", "enable_fp_fusion")}
        types: dict[str, str] = {}
        constants: dict[str, Any] = {}
        divisible: dict[tuple[int, ...], Any] = {}
        for place, name in enumerate(self.kernel.arg_names):
            value = named[name] if name in named else given[place]
            if isinstance(value, Tensor):
                types[name] = {"float32": "*fp32", "bfloat16": "*bf16", "bool": "*i1"}[str(value.dtype)[6:]]
            elif name in named or value is None or value == 1:
                types[name], constants[name] = "constexpr", value
                continue
            else:
                types[name] = "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"
            if isinstance(value, Tensor) or value % 16 == 0:
                divisible[place,] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, types, constants, divisible)
        self.made.append(triton.compile(source, GPUTarget("cuda", self.capability, 32), options))


@pytest.mark.parametrize(
    ("capability", "dtype", "shape", "dim", "beta"),
    [(80, torch.float32, (8, 150, 512, 512), 1, 0.3), (90, torch.bfloat16, (8, 19, 512 * 512), 2, 0.0)],
    ids=["pixels on sm_80", "rows on sm_90"],
)
def test_they_compile_for_gpus_and_spill_nothing(
    capability: int, dtype: torch.dtype, shape: tuple[int, ...], dim: int, beta: float,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = [Compiled(getattr(_triton, name), capability) for name in ("_scan", "_pass")]
    for name, kernel in zip(("_scan", "_pass"), kernels, strict=True):
        monkeypatch.setattr(_triton, name, kernel)
    student, teacher = (torch.empty(shape, dtype=dtype, device="meta") for _ in range(2))
    here = torch.empty((8, 512, 512), dtype=torch.bool, device="meta") if dim == 1 else None
    work = _triton.Divergence(student, teacher, 4.0, beta, dim, here)
    value, statistics = work.value()
    assert work.gradient(value, statistics).shape == shape
    made = [one for kernel in kernels for one in kernel.made]
    assert len(made) == 2
    for number, one in enumerate(made):
        file = tmp_path / f"{number}.cubin"
        file.write_bytes(one.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        told = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
        assert "STACK:0" in told, told
        assert "LOCAL:0" in told, told
        assert re.search(r"ld\.global\S*\.v[248]", one.asm["ptx"]), "one number is loaded at a time"
