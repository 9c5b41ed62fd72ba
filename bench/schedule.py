"""How close the fused kernels' products stand in their machine code: without a GPU.

    python bench/schedule.py build/native/fastalps_cuda/fused.cu.o

Every instruction says how many cycles its warp waits at least before the next one. On sm_80 and
sm_90 a product (HMMA) has no more to tell when it is done: sums that are needed are waited for in
the code, a branch waits for all of them, and so does not show in any hardware counter of its own. A
line a kernel and shape, over the stretches of code between branches and barriers that have
products:

    products   as they stand in the code, not as often as they run
    cycles     the least that a warp takes from one to the next. Back to back it is BACK_TO_BACK,
               what ptxas writes between products of one warp on sm_90: then a warp alone keeps the
               tensor cores busy
    drains     waits for all sums, at a branch or because the next product needs one

Waits for loads and barriers come on top. `--stretches` prints each of them.

The place of these bits is not documented by NVIDIA; it is known from assemblers for this
architecture, such as CuAssembler: of an instruction's 128 bits, 105 to 108.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.command_line import Parser, guarded
from bench.cuda_compile import disassembly, kernel_name
from fastalps.errors import UserError

BACK_TO_BACK = 6
ARCHITECTURE = "sm_90"


class Instruction(NamedTuple):
    """One line of the disassembly."""

    place: int
    text: str
    cycles: int  # that its warp waits at least before the next one

    @property
    def name(self) -> str:
        words = self.text.split()
        return (words[1] if words[0].startswith("@") else words[0]).split(".")[0]


class Stretch(NamedTuple):
    """Code that is run from its first instruction to its last one."""

    first: int
    last: int
    instructions: int
    products: int
    cycles: int
    drains: int


def instructions(lines: Iterable[str]) -> Iterator[Instruction]:
    """Those of one function of `cuobjdump -sass`, in two lines each."""
    first = None
    for line in lines:
        if match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s+/\* 0x[0-9a-f]{16} \*/", line):
            first = int(match[1], 16), match[2]
        elif first and (match := re.match(r"\s+/\* 0x([0-9a-f]{16}) \*/", line)):
            yield Instruction(*first, int(match[1], 16) >> 41 & 15)
            first = None


def stretches(code: Sequence[Instruction]) -> Iterator[Stretch]:
    """What stands between branches, their targets and barriers."""
    jumps = [re.search(r"\bBRA\b.* 0x([0-9a-f]+)", each.text) for each in code]
    targets = {int(jump[1], 16) for jump in jumps if jump}
    begin = 0
    for i, each in enumerate(code):
        ends = each.name in ("BRA", "BAR", "EXIT") or i + 1 == len(code)
        if not ends and code[i + 1].place not in targets:
            continue
        part, begin = code[begin : i + 1], i + 1
        yield Stretch(
            part[0].place,
            part[-1].place,
            len(part),
            sum(one.name == "HMMA" for one in part),
            sum(one.cycles for one in part),
            sum(one.name == "NOP" and one.cycles > 1 for one in part),
        )


def with_products(code: Sequence[Instruction]) -> list[Stretch]:
    """Those of `stretches` that have products."""
    return [each for each in stretches(code) if each.products]


def spacing(found: Sequence[Stretch]) -> float:
    """Cycles from product to product."""
    return sum(each.cycles for each in found) / max(1, sum(each.products for each in found))


def _shape(symbol: str) -> str:
    match = re.search(r"ShapeI((?:Li\d+E)+)", symbol)
    return " ".join(re.findall(r"\d+", match[1])) if match else ""


def _run(options: argparse.Namespace) -> int:
    found = {
        symbol: with_products(list(instructions(lines)))
        for (symbol, architecture), lines in disassembly(options.object).items()
        if architecture == ARCHITECTURE and options.kernel in kernel_name(symbol)
    }
    if not any(found.values()):
        raise UserError(
            f"{options.object}: expected code for {ARCHITECTURE} with tensor-core products"
            + (f" in a kernel named {options.kernel}" if options.kernel else "")
            + ", found none"
        )
    print(f"{'kernel':<22}{'shape':<22}{'products':>9}{'cycles':>8}{'drains':>8}")
    for symbol, parts in found.items():
        if not parts:
            continue
        products, drains = sum(p.products for p in parts), sum(p.drains for p in parts)
        print(
            f"{kernel_name(symbol):<22}{_shape(symbol):<22}{products:>9}"
            f"{spacing(parts):>8.2f}{drains:>8}"
        )
        for each in parts if options.stretches else ():
            print(
                f"  {each.first:05x} to {each.last:05x}: {each.instructions} instructions, "
                f"{each.products} products, {each.cycles} cycles, {each.drains} drains"
            )
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    parser = Parser(
        prog="bench/schedule.py",
        description=__doc__,
    )
    parser.add_argument(
        "object", type=Path, help="the compiled csrc/cuda/fused.cu, with code for sm_90"
    )
    parser.add_argument("--kernel", default="", help="only kernels whose names have this part")
    parser.add_argument("--stretches", action="store_true", help="print each stretch, too")
    return guarded(lambda: _run(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
