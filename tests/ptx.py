"""Run the PTX of a kernel without a GPU: slowly, and only what the kernels under test are made of.

All threads of a program go through an instruction at once, as NumPy arrays with a value a thread, so branches must be
uniform and barriers mean nothing. What was never written is a pattern that makes NaN of most numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
_UNSIGNED: dict[int, Any] = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_SIGNED: dict[int, Any] = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
_UNWRITTEN = 0xFFC1FFC1FFC1FFC1
_NULL = 64  # addresses below are nobody's
_BOOLEAN: dict[str, Callable[..., Array]] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
_COMPARE: dict[str, Callable[..., Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_ARITHMETIC: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "min": np.minimum,
    "max": np.maximum,
}
# Which a GPU approximates.
_FUNCTIONS: dict[str, Callable[..., Array]] = {
    "div": np.divide,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "ex2": np.exp2,
}


class Program:
    """The threads of one program, over a memory of bytes that addresses are indices of."""

    def __init__(self, ptx: str, threads: int, memory: Array) -> None:
        self.threads, self.memory = threads, memory
        self.code, self.labels = _parse(ptx)

    def run(self, parameters: list[int], place: tuple[int, int, int], grid: tuple[int, int, int]) -> None:
        for _ in self.steps(parameters, place, grid):
            pass

    def steps(self, parameters: list[int], place: tuple[int, int, int], grid: tuple[int, int, int]) -> Iterator[None]:
        """As `run`, and others may go on after every jump: programs can wait for each other."""
        self.parameters, self.shared = parameters, np.zeros(2**18, np.uint8)
        self.registers: dict[str, Array] = {"%tid.x": np.arange(self.threads, dtype=np.uint32)}
        for axis, number, count in zip("xyz", place, grid, strict=True):
            self.registers[f"%ctaid.{axis}"] = np.full(self.threads, number, np.uint32)
            self.registers[f"%nctaid.{axis}"] = np.full(self.threads, count, np.uint32)
        at = 0
        while at < len(self.code):
            name, operands, condition = self.code[at]
            at += 1
            where = self._condition(condition)
            if name.startswith(("bra", "ret")):
                assert where.all() or not where.any(), "threads part ways"
                if where.all():
                    at = self.labels[operands[0]] if name.startswith("bra") else len(self.code)
                    yield
            else:
                with np.errstate(all="ignore"):
                    self._step(name.split("."), operands, where)

    def _condition(self, name: str | None) -> Array:
        if name is None:
            return np.ones(self.threads, bool)
        return ~self._get(name[1:], 1) if name[0] == "!" else self._get(name, 1)

    def _get(self, name: str, bits: int) -> Array:
        """A register, or a constant."""
        kind = _UNSIGNED[bits]
        if re.fullmatch(r"-?\d+|0x\w+|0f\w+", name):
            name = name.removesuffix("U")
            number = int(name[2:], 16) if name.startswith("0f") else int(name, 0)
            return np.full(self.threads, bool(number & 1) if bits == 1 else number & (2**bits - 1), kind)
        if name == "global_smem":
            return np.zeros(self.threads, kind)
        if name not in self.registers:
            self.registers[name] = np.full(self.threads, _UNWRITTEN & (2**bits - 1), kind)
        return self.registers[name]

    def _float(self, name: str) -> Array:
        return self._get(name, 32).view(np.float32)

    def _put(self, name: str, value: Array, where: Array) -> None:
        value = np.ascontiguousarray(value)
        value = value.view(np.uint32) if value.dtype == np.float32 else value
        old = self._get(name, 1 if value.dtype == bool else 8 * value.itemsize)
        self.registers[name] = np.where(where, value, old)

    def _step(self, name: list[str], operands: list[str], where: Array) -> None:
        if name[0] in ("ld", "st") and name[1] != "param":
            self._access(name, operands, where)
        elif name[0] == "mma":
            self._mma(name, operands)
        elif name[0] == "mov" and operands[0].startswith("{"):
            parts, bits = _names(operands[0]), int(name[-1][1:])
            width = bits // len(parts)
            for number, part in enumerate(parts):
                value = self._get(operands[1], bits) >> _UNSIGNED[bits](width * number)
                self._put(part, value.astype(_UNSIGNED[width]), where)
        elif name[0] not in ("bar", "barrier"):
            self._put(operands[0].split("|")[0], self._value(name, operands), where)

    def _value(self, name: list[str], operands: list[str]) -> Array:
        kind, first, given = name[0], operands[0], operands[1:]
        type_ = name[-1]
        if type_ in ("bf16x2", "f16x2") and kind != "cvt":
            return self._pair(kind, type_, given)
        if type_ == "f32" and kind in ("add", "sub", "mul", "fma"):
            values = [self._float(each).astype(np.float64) for each in given]
            result = values[0] * values[1] + values[2] if kind == "fma" else _ARITHMETIC[kind](*values)
            return result.astype(np.float32)
        if type_ == "f32" and kind in _FUNCTIONS:
            return _FUNCTIONS[kind](*(self._float(each).astype(np.float64) for each in given)).astype(np.float32)
        if kind == "cvt":
            return self._convert(name, given[0])
        bits = 1 if type_ == "pred" else int(type_[1:])
        unsigned, signed = _UNSIGNED[bits], type_[0] == "s"
        if kind == "ld":  # of a parameter
            number = self.parameters[int(re.findall(r"param_(\d+)", given[0])[0])]
            return np.full(self.threads, number & (2**bits - 1), unsigned)
        if kind == "mov" and given[0].startswith("{"):
            parts = _names(given[0])
            width = bits // len(parts)
            joined = np.zeros(self.threads, unsigned)
            for number, part in enumerate(parts):
                joined |= self._get(part, width).astype(unsigned) << unsigned(width * number)
            return joined
        if kind in ("shl", "shr"):
            return _shifted(kind, self._get(given[0], bits), self._get(given[1], 32), signed)
        if kind == "shfl":
            own, other = np.arange(self.threads), self._get(given[1], 32).astype(np.int64)
            return self._get(given[0], 32)[own ^ other if name[2] == "bfly" else own // 32 * 32 + other % 32]
        if kind == "vote":  # which of a warp's lanes; here of all threads, which go together
            return np.full(self.threads, self._get(given[0], 1).any())
        if kind == "selp":
            return np.where(self._get(given[2], 1), self._get(given[0], bits), self._get(given[1], bits))
        if kind in ("mul", "mad") and name[1] == "wide":
            narrow = (_SIGNED if signed else _UNSIGNED)[bits]
            factors = [self._get(each, bits).view(narrow).astype(np.int64) for each in given[:2]]
            product = (factors[0] * factors[1]).view(np.uint64)
            return product + self._get(given[2], 64) if kind == "mad" else product
        values = [self._get(each, bits) for each in given if not (kind == "lop3" and each == given[-1])]
        if kind == "lop3":
            return _by_table(values, int(given[-1], 0))
        if kind == "prmt":
            return _bytes_by(values)
        if kind == "bfe":
            field = (values[0] >> values[1]) & ((unsigned(1) << values[2]) - unsigned(1))
            return _shifted("shr", field << (bits - values[2]), bits - values[2], True) if signed else field
        if kind == "mad":
            return values[0] * values[1] + values[2]
        if kind in ("mov", "not"):
            return ~values[0] if kind == "not" else values[0]
        if kind == "neg":
            return np.zeros_like(values[0]) - values[0]
        if kind in _BOOLEAN:
            return _BOOLEAN[kind](*values)
        if signed:
            values = [value.view(_SIGNED[bits]) for value in values]
        if kind == "setp":
            return _COMPARE[name[1]](*values)
        if kind == "div":  # towards zero
            return np.trunc(values[0].astype(np.float64) / values[1]).astype(values[0].dtype).view(unsigned)
        if kind in _ARITHMETIC:
            return _ARITHMETIC[kind](*values).view(unsigned)
        raise NotImplementedError(f"{'.'.join(name)} {first} {given}")

    def _convert(self, name: list[str], source: str) -> Array:
        to, from_ = name[-2], name[-1]
        if from_ == "f32":
            return _narrow(self._float(source), to)
        if to == "f32" and from_ == "s32":
            return self._get(source, 32).view(np.int32).astype(np.float32)
        if to == "f32":
            return _widen(self._get(source, 16), from_).astype(np.float32)
        bits = int(from_[1:])
        value = self._get(source, bits)
        return value.view(_SIGNED[bits] if from_[0] == "s" else _UNSIGNED[bits]).astype(_UNSIGNED[int(to[1:])])

    def _pair(self, kind: str, type_: str, given: list[str]) -> Array:
        halves = []
        for shift in (0, 16):
            values = [_widen(self._get(each, 32) >> np.uint32(shift), type_).astype(np.float64) for each in given]
            result = _ARITHMETIC["mul" if kind == "fma" else kind](*values[:2]) + (values[2] if kind == "fma" else 0.0)
            halves.append(_narrow(result.astype(np.float32), type_.removesuffix("x2")).astype(np.uint32))
        return halves[0] | (halves[1] << np.uint32(16))

    def _access(self, name: list[str], operands: list[str], where: Array) -> None:
        store = name[0] == "st"
        memory, least = (self.shared, 0) if name[1] == "shared" else (self.memory, _NULL)
        address, registers = (operands if store else operands[::-1])[:2]
        size, names = int(name[-1][1:]) // 8, _names(registers)
        start = self._address(address)
        assert (start[where] % (size * len(names)) == 0).all(), "an address is not a multiple of the size"
        assert (start[where] >= least).all(), "below all memory"
        assert (start[where] + size * len(names) <= len(memory)).all(), "beyond all memory"
        for number, register in enumerate(names):
            bytes_ = np.where(where, start + number * size, least)[:, None] + np.arange(size)
            if store:
                memory[bytes_[where]] = self._get(register, 8 * size)[where].reshape(-1, 1).view(np.uint8)
            else:
                self._put(register, memory[bytes_].view(_UNSIGNED[8 * size]).reshape(-1), where)

    def _address(self, operand: str) -> Array:
        base, _, offset = operand.strip("[] ").partition("+")
        register = self._get(base.strip(), 32 if base.strip() == "global_smem" else 64)
        return register.astype(np.int64) + int(offset or "0", 0)

    def _mma(self, name: list[str], operands: list[str]) -> None:
        """m16n8k16: PTX ISA, "Matrix Fragments for mma.m16n8k16"."""
        type_ = name[-3]
        warps, lane = self.threads // 32, np.arange(32)
        r, q = lane // 4, lane % 4
        results, left, right, sums = (_names(each) for each in operands)
        a, b, c = np.zeros((warps, 16, 16)), np.zeros((warps, 16, 8)), np.zeros((warps, 16, 8))
        for half in range(2):
            for number, register in enumerate(left):
                bits = self._get(register, 32).reshape(warps, 32) >> np.uint32(16 * half)
                a[:, r + 8 * (number % 2), 2 * q + half + 8 * (number // 2)] = _widen(bits, type_)
            for number, register in enumerate(right):
                bits = self._get(register, 32).reshape(warps, 32) >> np.uint32(16 * half)
                b[:, 2 * q + half + 8 * number, r] = _widen(bits, type_)
        for number, register in enumerate(sums):
            c[:, r + 8 * (number // 2), 2 * q + number % 2] = self._float(register).reshape(warps, 32)
        product = (a @ b + c).astype(np.float32)
        for number, register in enumerate(results):
            value = product[:, r + 8 * (number // 2), 2 * q + number % 2].reshape(-1)
            self._put(register, value, np.ones(self.threads, bool))


def _parse(ptx: str) -> tuple[list[tuple[str, list[str], str | None]], dict[str, int]]:
    """Instructions (name, operands, condition), and where the labels are; those of inline PTX are jumped back to."""
    body = ptx[ptx.index("{", ptx.index(".entry")) + 1 : ptx.rindex("}")]
    body = re.sub(r"//[^\n]*", "", body)
    body = re.sub(r"(?m)^\s*\.(loc|pragma|section|file|reg)\b[^\n]*$", "", body)
    code, labels = [], {}
    inline: dict[str, str] = {}  # what the last label of a name is called in labels
    for statement in body.split(";"):
        text = " ".join(statement.split())
        while match := re.match(r"(\$?\w+): ?|\{ (?!%)|\{(?=[a-z.@])|\} ?", text):
            if match[1]:
                label = match[1]
                if label[0] != "$":
                    label = inline[match[1]] = f"{match[1]} {len(code)}"
                labels[label] = len(code)
            text = text[match.end() :]
        if not text or text.startswith("."):
            continue
        match = re.match(r"(?:@(!?%?\w+) )?(\S+) ?(.*)", text)
        assert match
        operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", match[3])
        if match[2] == "bra":
            operands = [inline.get(operands[0], operands[0])]
        code.append((match[2], operands, match[1]))
    return code, labels


def _names(operand: str) -> list[str]:
    return [each.strip() for each in operand.strip("{}").split(",")]


def _widen(bits: Array, type_: str) -> Array:
    """float32 of the lower 16 bits."""
    low = bits.astype(np.uint16)
    return (low.astype(np.uint32) << np.uint32(16)).view(np.float32) if "bf16" in type_ else low.view(np.float16)


def _narrow(value: Array, type_: str) -> Array:
    if type_ == "f16":
        return value.astype(np.float16).view(np.uint16)
    bits = value.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def _shifted(kind: str, value: Array, count: Array, signed: bool) -> Array:
    bits = 8 * value.itemsize
    inside = np.minimum(count, bits - 1).astype(value.dtype)
    if kind == "shr" and signed:
        return (value.view(_SIGNED[bits]) >> inside.view(_SIGNED[bits])).view(value.dtype)
    shifted = value << inside if kind == "shl" else value >> inside
    return np.where(count < bits, shifted, value.dtype.type(0))


def _by_table(values: list[Array], table: int) -> Array:
    result = np.zeros_like(values[0])
    for row in range(8):
        if table >> row & 1:
            a, b, c = (each if row >> bit & 1 else ~each for each, bit in zip(values, (2, 1, 0), strict=True))
            result |= a & b & c
    return result


def _bytes_by(values: list[Array]) -> Array:
    """Four bytes of eight, each chosen by four bits, of which the last means: its sign, eight times."""
    eight = values[0].astype(np.uint64) | values[1].astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(values[0])
    for place in range(4):
        choice = (values[2] >> np.uint32(4 * place)) & np.uint32(15)
        byte = (eight >> (8 * (choice & 7)).astype(np.uint64)).astype(np.uint32) & np.uint32(255)
        byte = np.where(choice & 8, (byte >> np.uint32(7)) * np.uint32(255), byte)
        result |= byte << np.uint32(8 * place)
    return result
