"""Find registers that change under an asynchronous product of Hopper's tensor cores, in machine code (SASS).

HGMMA reads its left operand from registers after it was issued; WARPGROUP.DEPBAR.LE gsb0, n waits until at most n
groups of them run. What is written in between is a race, and neither Triton nor ptxas reports it: Triton 3.6 emits such
code for a loop with one product (see `_product` in matmul/triton_swizzled.py).
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import triton

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<text>[A-Z][^;]*?)\s*;")
_LABEL = re.compile(r"^\s*(?P<label>\.L_\w+):")
_PRODUCT = re.compile(r"HGMMA\.64x(?P<n>\d+)x16\S*\s+R(?P<sum>\d+), (?:R(?P<left>\d+)|gdesc)")
_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, (?P<left>0x[0-9a-f]+)")
_LEFT_REGISTERS = 4  # 64 x 16 values of 16 bits among 128 threads
_WITHOUT_RESULT = ("ST", "RED", "BAR", "BRA", "SYNCS", "U", "DEPBAR", "WARPGROUP", "EXIT", "NOP", "MEMBAR", "FENCE")


class Product(NamedTuple):
    """The registers of a product under way, and whether it ends a group."""

    left: frozenset[int]
    sum: frozenset[int]
    ends_group: bool


def disassemble(cubin: bytes, folder: Path) -> str:
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return subprocess.run([tool, "-c", file], check=True, capture_output=True, text=True).stdout


def hazards(sass: str) -> tuple[int, list[str]]:
    """How many products have their left operand in registers, and the instructions that touch a running product's."""
    products, found = 0, []
    running: list[Product] = []
    for text in _twice_through_loops(sass):
        if match := _PRODUCT.match(text):
            first, n = int(match["sum"]), int(match["n"])
            left = range(int(match["left"]), int(match["left"]) + _LEFT_REGISTERS) if match["left"] else ()
            products += bool(match["left"])
            running.append(Product(frozenset(left), frozenset(range(first, first + n // 2)), text.endswith("gsb0")))
        elif match := _WAIT.match(text):
            running = _last_groups(running, int(match["left"], 16))
        else:
            reads, writes = _registers(text)
            if any(writes & (p.left | p.sum) or reads & p.sum for p in running):
                found.append(text)
    return products, found


def _last_groups(running: list[Product], count: int) -> list[Product]:
    ends = [i for i, product in enumerate(running) if product.ends_group]
    return running[ends[-count - 1] + 1 :] if len(ends) > count else running


def _twice_through_loops(sass: str) -> list[str]:
    """The instructions in their order, with every innermost loop that holds a product written out twice."""
    labels: dict[str, int] = {}
    out: list[str] = []
    for line in sass.splitlines():
        if match := _LABEL.match(line):
            labels[match["label"]] = len(out)
        if not (match := _INSTRUCTION.search(line)):
            continue
        out.append(match["text"])
        target = re.search(r"BRA.*`\((\.L_\w+)\)", match["text"])
        if target and target[1] in labels:
            body = out[labels[target[1]] :]
            if any(text.startswith("HGMMA") for text in body):
                out += body
                labels.clear()  # an outer loop repeats nothing new
    return out


def _registers(text: str) -> tuple[set[int], set[int]]:
    """Those that an instruction reads and writes, as far as it names them."""
    name, _, operands = text.partition(" ")
    parts = operands.split(",")
    named = [_span(name, operand) for operand in parts]
    if not named or name.startswith(_WITHOUT_RESULT):
        return set().union(*named), set()
    results = 1 if named[0] else 2  # a predicate may come first
    if "WIDE" in name:  # its two factors are not
        named[results : results + 2] = [_span("", factor) for factor in parts[results : results + 2]]
    return set().union(*named[results:]), set().union(*named[:results])


def _span(name: str, operand: str) -> set[int]:
    """The registers of an operand; an address and a wide value are more than the one that is named."""
    match = re.match(r"\s*[-|~!]*R(\d+)", operand)
    if not match:
        return {int(r) for r in re.findall(r"\bR(\d+)", operand)}
    width = 4 if ".128" in name else 2 if ".64" in name or "WIDE" in name else 1
    first = int(match[1])
    return set(range(first, first + width))
