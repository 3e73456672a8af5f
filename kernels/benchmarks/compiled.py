"""What the kernels compile to on chips that are not here: a gate on spills and tensor cores.

    python kernels/benchmarks/compiled.py      every kernel, dtype and option, sm_80 and sm_90

Needs triton and no GPU. Exits with 1 if a kernel spills registers, needs more shared memory than
the chip has, multiplies two-byte operands without tensor-core instructions, or writes a matrix two
bytes at a time although its sizes divide by 16.
"""

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from slm_kernels import backward, forward
from slm_kernels.tiles import FLOAT32, TILES, Tile

CHIPS = {"ampere": 80, "hopper": 90}
SHARED_KB = {80: 163, 90: 227}  # that one program may have
TENSOR_CORE = {80: "HMMA", 90: "HGMMA"}
POINTER = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
CACHE = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp16"}
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Case(NamedTuple):
    kernel: str
    function: Any
    chip: str
    dtype: str
    tile: Tile
    signature: dict[str, str]
    constants: dict[str, Any]
    label: str

    @property
    def divisible(self) -> bool:
        """Vocabulary and slices by 16, as Triton notices at the launch."""
        return self.label.startswith("divisible")


class Row(NamedTuple):
    case: Case
    registers: int
    stack_bytes: int
    spills: int  # local loads and stores
    shared_kb: float
    tensor_core: int  # instructions
    narrow_stores: int  # of two bytes

    def faults(self) -> list[str]:
        capability = CHIPS[self.case.chip]
        found = []
        if self.stack_bytes or self.spills:
            found.append(f"spills: {self.stack_bytes} bytes of stack, {self.spills} instructions")
        if self.shared_kb > SHARED_KB[capability]:
            found.append(f"shared memory {self.shared_kb:.0f} KB > {SHARED_KB[capability]} KB")
        multiplies = "BLOCK_D" in self.case.constants
        if multiplies and self.case.dtype != "fp32" and not self.tensor_core:
            found.append(f"no {TENSOR_CORE[capability]} instruction")
        if self.case.divisible and self.narrow_stores:
            found.append(f"{self.narrow_stores} stores of two bytes")
        return found


def signature_of(function: Any, types: dict[str, str], constants: dict[str, Any]) -> dict[str, str]:
    """Pointers by name, floats by name, constants, and 32-bit integers for what is left."""
    return {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in function.arg_names
    }


def head_cases(
    kernel: str, function: Any, chip: str, dtype: str, types: dict[str, str]
) -> Iterator[Case]:
    flags = [name for name in function.arg_names if name.startswith(("HAS_", "WANT_", "WHOLE_"))]
    plain = {name: name == "WHOLE_D" for name in flags}
    variants = [("plain", plain), ("everything", dict.fromkeys(flags, True))]
    variants += [("divisible", plain), ("odd width", plain | {"WHOLE_D": False})]
    if kernel == "stats":
        cache = plain | {"HAS_CACHE": True}
        variants += [("cache", cache), ("divisible, cache", cache)]
    if "WANT_ENTROPY" in flags:
        score = {"WANT_ENTROPY": kernel == "score", "WANT_ARGMAX": kernel == "score"}
        score |= {"HAS_CACHE": False} if kernel == "score" else {}  # in "everything"
        variants = [(label, chosen | score) for label, chosen in variants]
    for label, chosen in variants:
        is_plain = chosen["WHOLE_D"] and sum(chosen.values()) == 1
        tile = FLOAT32 if dtype == "fp32" else TILES[chip, is_plain]
        constants: dict[str, Any] = {"BLOCK_N": tile.rows, "BLOCK_V": tile.vocab}
        constants |= {"BLOCK_D": tile.width, "GROUP_N": tile.group, "UPCAST": False} | chosen
        absent = {"bias": "HAS_BIAS", "cache": "HAS_CACHE", "cache_offset": "HAS_CACHE"}
        absent |= {"sum_exp_z_out": "WANT_ENTROPY", "argmax_out": "WANT_ARGMAX"}
        for name, flag in absent.items():
            if name in function.arg_names and flag in flags and not chosen[flag]:
                if name in ("bias", "sum_exp_z_out", "argmax_out"):
                    constants[name] = None
        signature = signature_of(function, types, constants)
        yield Case(kernel, function, chip, dtype, tile, signature, constants, label)


def cases() -> Iterator[Case]:
    for chip, dtype in itertools.product(CHIPS, POINTER):
        operand = POINTER[dtype]
        floats = dict.fromkeys(("logit_scale", "softcap"), "fp32")
        rows = dict.fromkeys(("row_max", "scale", "at_target"), "*fp32")
        common = {"weight": operand, "bias": operand, "targets": "*i64", "cache": CACHE[dtype]}
        common |= floats | {"cache_offset": "*fp32"}
        outputs = ("row_max_out", "sum_exp_out", "target_logit_out", "sum_exp_z_out")
        stats = common | {"hidden": operand, "argmax_out": "*i32"}
        stats |= dict.fromkeys(outputs, "*fp32")
        for kernel in ("stats", "score"):
            yield from head_cases(kernel, forward._stats_kernel, chip, dtype, stats)
        types = common | rows | {"selected": operand, "out": operand}
        yield from head_cases("gradient", backward._gradient_kernel, chip, dtype, types)
        constants = {"BLOCK_N": 16, "BLOCK_V": 128, "CACHE_BLOCK": 128, "HAS_SOFTCAP": True}
        cached, types = backward._cached_gradient_kernel, types | {"positions": "*i64"}
        signature = signature_of(cached, types, constants)
        plain = Tile(16, 128, 0, 4, 3, 0)
        for label in ("everything", "divisible"):
            yield Case("cached", cached, chip, dtype, plain, signature, constants, label)


def compiled(case: Case) -> Row:
    names = list(case.signature)
    aligned = [name for name, kind in case.signature.items() if kind.startswith("*")]
    if case.constants.get("WHOLE_D", True):
        aligned += [name for name in names if name.endswith("_stride") or name == "D"]
    if case.divisible:
        aligned += [name for name, kind in case.signature.items() if kind == "i32"]
    never = {*case.constants, *case.function.do_not_specialize}
    aligned = [name for name in aligned if name not in never]
    attrs: Any = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    constants: Any = {(names.index(name),): value for name, value in case.constants.items()}
    source = ASTSource(case.function, case.signature, constants, attrs)
    capability = CHIPS[case.chip]
    target = GPUTarget("cuda", capability, 32)
    binary = triton.compile(source, target=target, options=case.tile.options())
    usage, code = inspect_cubin(binary.asm["cubin"])
    registers, stack = (int(re.findall(rf"{name}:(\d+)", usage)[0]) for name in ("REG", "STACK"))
    spills = len(re.findall(r"\b(?:STL|LDL)\b", code))
    tensor_core = len(re.findall(rf"\b{TENSOR_CORE[capability]}\b", code))
    narrow = len(re.findall(r"\bSTG\.E\.U16\b", code))
    return Row(case, registers, stack, spills, binary.metadata.shared / 1024, tensor_core, narrow)


def inspect_cubin(cubin: bytes) -> tuple[str, str]:
    """cuobjdump's resource usage and the machine code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)

        def output(*command: str) -> str:
            words = [str(BINARIES / command[0]), *command[1:], str(path)]
            return subprocess.run(words, check=True, capture_output=True, text=True).stdout

        return output("cuobjdump", "-res-usage"), output("nvdisasm", "-c", "-ndf")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--dtype", nargs="+", choices=POINTER, default=list(POINTER))
    parser.add_argument("--options", nargs="+", help="all, unless named")
    given = parser.parse_args()
    print(f"triton {triton.__version__}")
    print(f"{'kernel':9} {'chip':7} {'dtype':5} {'options':16} registers  shared KB  tensor-core")
    failed = 0
    for case in cases():
        if case.dtype not in given.dtype or case.label not in (given.options or [case.label]):
            continue
        row = compiled(case)
        faults = row.faults()
        failed += bool(faults)
        print(
            f"{case.kernel:9} sm_{CHIPS[case.chip]:<4} {case.dtype:5} {case.label:16} "
            f"{row.registers:9} {row.shared_kb:10.0f} {row.tensor_core:12}  {'; '.join(faults)}",
            flush=True,
        )
    sys.exit(f"{failed} kernels failed" if failed else 0)


if __name__ == "__main__":
    main()
