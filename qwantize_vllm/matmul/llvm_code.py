"""Writing LLVM code by hand: vectors of 16 float32 lanes, addresses as integers, loops.

LLVM splits the 16 lanes into what the machine has (AVX-512: one register, AVX2: two, NEON: four).
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence

from llvmlite import ir

LANES = 16
INT8, INT16, INT32, INT64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
FLOAT = ir.FloatType()
INT32S, FLOATS = ir.VectorType(INT32, LANES), ir.VectorType(FLOAT, LANES)


def int64(value: int) -> ir.Constant:
    return ir.Constant(INT64, value)


def int32s(value: int) -> ir.Constant:
    """The same int32 in all lanes."""
    return ir.Constant(INT32S, [value] * LANES)


class Code(ir.IRBuilder):
    """The body of `void name(int64 *job)`, written from its first block on."""

    def __init__(self, name: str) -> None:
        function = ir.Function(ir.Module(), ir.FunctionType(ir.VoidType(), [INT64.as_pointer()]), name)
        super().__init__(function.append_basic_block("entry"))

    def fields(self, names: Sequence[str]) -> types.SimpleNamespace:
        """The job's int64 fields by name, and `address_of` each."""
        start = self.ptrtoint(self.function.args[0], INT64)
        addresses = {name: self.add(start, int64(8 * i)) for i, name in enumerate(names)}
        values = {name: self.read(address, INT64) for name, address in addresses.items()}
        return types.SimpleNamespace(**values, address_of=addresses)

    def pointer(self, address: ir.Value, type_: ir.Type) -> ir.Value:
        return self.inttoptr(address, type_.as_pointer())

    def read(self, address: ir.Value, type_: ir.Type) -> ir.Value:
        """A scalar, or a vector at any address."""
        return self.load(self.pointer(address, type_), align=1 if isinstance(type_, ir.VectorType) else None)

    def minimum(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.select(self.icmp_signed("<", a, b), a, b)

    def spread(self, scalar: ir.Value) -> ir.Value:
        """A float in all lanes."""
        lane0 = self.insert_element(ir.Constant(FLOATS, ir.Undefined), scalar, ir.Constant(INT32, 0))
        return self.shuffle_vector(lane0, lane0, int32s(0))

    def multiply_add(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        return self.call(self.intrinsic("llvm.fma.v16f32", FLOATS, [FLOATS, FLOATS, FLOATS]), [a, b, c])

    def sum_of_lanes(self, lanes: ir.Value) -> ir.Value:
        reduce = self.intrinsic("llvm.vector.reduce.fadd.v16f32", FLOAT, [FLOAT, FLOATS])
        return self.call(reduce, [ir.Constant(FLOAT, 0.0), lanes], fastmath=("reassoc",))

    def intrinsic(self, name: str, result: ir.Type, arguments: Sequence[ir.Type]) -> ir.Function:
        known = self.module.globals.get(name)
        return known or ir.Function(self.module, ir.FunctionType(result, arguments), name)

    def loop(
        self,
        start: ir.Value,
        stop: ir.Value,
        step: int,
        body: Callable[[ir.Value, list[ir.Value]], Sequence[ir.Value]],
        carried: Sequence[ir.Value] = (),
    ) -> list[ir.Value]:
        """for i in range(start, stop, step): carried = body(i, carried); returns what is carried in the end."""
        before = self.block
        head, inside, after = (self.append_basic_block(name) for name in ("head", "inside", "after"))
        self.branch(head)
        self.position_at_end(head)
        i, *values = (self.phi(value.type) for value in (start, *carried))
        self.cbranch(self.icmp_signed("<", i, stop), inside, after)
        self.position_at_end(inside)
        results = body(i, values)
        for phi, first, following in zip(
            (i, *values), (start, *carried), (self.add(i, int64(step)), *results), strict=True
        ):
            phi.add_incoming(first, before)
            phi.add_incoming(following, self.block)
        self.branch(head)
        self.position_at_end(after)
        return values

    def only_if(
        self, condition: ir.Value, then: Callable[[], Sequence[ir.Value]], otherwise: Sequence[ir.Value]
    ) -> list[ir.Value]:
        """then() where the condition holds, else `otherwise`."""
        before = self.block
        inside, after = self.append_basic_block("then"), self.append_basic_block("after")
        self.cbranch(condition, inside, after)
        self.position_at_end(inside)
        results = then()
        end = self.block
        self.branch(after)
        self.position_at_end(after)
        merged = []
        for result, other in zip(results, otherwise, strict=True):
            phi = self.phi(result.type)
            phi.add_incoming(result, end)
            phi.add_incoming(other, before)
            merged.append(phi)
        return merged

    def work_off(self, counter: ir.Value, total: ir.Value, chunk: int, body: Callable) -> None:
        """Each thread takes the next chunk of range(total) until none is left: body(first, end).

        counter: address of an int64 that all threads share, 0 at first. A thread that the system runs
        late, or not at all, holds up no one.
        """
        take, work, done = (self.append_basic_block(name) for name in ("take", "work", "done"))
        self.branch(take)
        self.position_at_end(take)
        first = self.atomic_rmw("add", self.pointer(counter, INT64), int64(chunk), "monotonic")
        self.cbranch(self.icmp_signed("<", first, total), work, done)
        self.position_at_end(work)
        body(first, self.minimum(self.add(first, int64(chunk)), total))
        self.branch(take)
        self.position_at_end(done)
        self.ret_void()
