"""What the kernels need of the machine beneath Python: ordered loads and stores, a pause, the kernel's calls.

Each is an *intrinsic*: a function that numba asks for the code to put in its place, written with llvmlite's builder. An
address is an int64 everywhere, so that no kernel holds an object of Python; whoever calls it keeps the memory alive.

What a load with *acquire* sees, and all that was written before the store with *release* that it saw, is seen by what
follows it. That is all the order that the kernels rely on, on any processor; on x86-64 both are plain moves. A fence is
for the one other case, "I write mine, then look at yours", which no acquire and release puts in order.
"""

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

I8 = ir.IntType(8)
I16 = ir.IntType(16)
I32 = ir.IntType(32)
I64 = ir.IntType(64)
LINE_BYTES = 64
VECTOR = ir.VectorType(I64, LINE_BYTES // 8)
F32 = ir.FloatType()
HALF = ir.HalfType()
BYTES = I8.as_pointer()
WORD_BYTES = 8
FUTEX_WAKE = 1
SYS_FUTEX = 202
"""On x86-64; backends/shm/doorbell.py refuses other machines."""
CLOCK_MONOTONIC = 1
KERNEL = types.int64(types.int64, types.int64, types.int64, types.int64)
kernel = njit(KERNEL, nogil=True, cache=True, error_model="numpy")
"""What Python calls, without its lock; numpy's errors, so that a division looks for no zero."""
inner = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, error_model="numpy")
"""What only kernels call; without a way in from Python it takes half as long to compile."""


def _word(builder, address):
    return builder.inttoptr(address, I64.as_pointer())  # an atomic store wants a typed pointer


@intrinsic
def load(typing, address):
    """Return the word of 8 bytes at ``address``; no order, for words that no other rank writes meanwhile."""

    def generate(context, builder, signature, args):
        return builder.load(_word(builder, args[0]))

    return types.int64(types.int64), generate


@intrinsic
def store(typing, address, value):
    """Write a word of 8 bytes; no order."""

    def generate(context, builder, signature, args):
        builder.store(args[1], _word(builder, args[0]))

    return types.void(types.int64, types.int64), generate


@intrinsic
def load_acquire(typing, address):
    """Return a word; what was written before it was stored with release is seen from here on."""

    def generate(context, builder, signature, args):
        return builder.load_atomic(_word(builder, args[0]), "acquire", WORD_BYTES)

    return types.int64(types.int64), generate


@intrinsic
def store_release(typing, address, value):
    """Write a word; who sees it with acquire sees all that was written before."""

    def generate(context, builder, signature, args):
        builder.store_atomic(args[1], _word(builder, args[0]), "release", WORD_BYTES)

    return types.void(types.int64, types.int64), generate


@intrinsic
def fence(typing):
    """Let others see what was written before anything is read that comes after."""

    def generate(context, builder, signature, args):
        builder.fence("seq_cst")

    return types.void(), generate


@intrinsic
def pause(typing):
    """Tell the core that it spins; by this name, as inline assembly ends the process."""

    def generate(context, builder, signature, args):
        if builder.module.triple.startswith("aarch64"):  # never run
            hint = builder.module.declare_intrinsic("llvm.aarch64.hint", (), ir.FunctionType(ir.VoidType(), [I32]))
            builder.call(hint, [I32(1)])
        else:
            name = "llvm.x86.sse2.pause"
            builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), []), name), [])

    return types.void(), generate


# A symbol of libc by its name stays valid in the cache, which an address from ctypes would not.


@intrinsic
def give_core_away(typing):
    """Let another process that waits for this core have it."""

    def generate(context, builder, signature, args):
        sched_yield = ir.FunctionType(I32, [])
        builder.call(cgutils.get_or_insert_function(builder.module, sched_yield, "sched_yield"), [])

    return types.void(), generate


@intrinsic
def wake(typing, address):
    """Wake all that sleep on the futex at ``address``."""

    def generate(context, builder, signature, args):
        syscall = ir.FunctionType(I64, [I64], var_arg=True)
        function = cgutils.get_or_insert_function(builder.module, syscall, "syscall")
        everybody = I32(2**31 - 1)
        builder.call(function, [I64(SYS_FUTEX), args[0], I32(FUTEX_WAKE), everybody, I64(0), I64(0), I32(0)])

    return types.void(types.int64), generate


@intrinsic
def now_ns(typing):
    """Return nanoseconds of a clock that only goes forward."""

    def generate(context, builder, signature, args):
        time = cgutils.alloca_once(builder, ir.ArrayType(I64, 2))
        clock_gettime = ir.FunctionType(I32, [I32, I64.as_pointer()])
        function = cgutils.get_or_insert_function(builder.module, clock_gettime, "clock_gettime")
        start = builder.bitcast(time, I64.as_pointer())
        builder.call(function, [I32(CLOCK_MONOTONIC), start])
        seconds = builder.load(start)
        return builder.add(builder.mul(seconds, I64(10**9)), builder.load(builder.gep(start, [I64(1)])))

    return types.int64(), generate


@intrinsic
def copy_bytes(typing, target, source, nbytes):
    """Copy bytes between places that do not overlap, as libc does it."""

    def generate(context, builder, signature, args):
        target, source = (builder.inttoptr(address, BYTES) for address in args[:2])
        cgutils.raw_memcpy(builder, target, source, args[2], 1)

    return types.void(types.int64, types.int64, types.int64), generate


def _line_copier(is_streaming):
    """Return an intrinsic that copies one line of the cache."""

    @intrinsic
    def copy_line(typing, target, source):
        def generate(context, builder, signature, args):
            target, source = (builder.inttoptr(address, VECTOR.as_pointer()) for address in args)
            line = builder.load(source, align=1)
            stored = builder.store(line, target, align=LINE_BYTES if is_streaming else 1)
            if is_streaming:
                stored.set_metadata("nontemporal", builder.module.add_metadata([I32(1)]))

        return types.void(types.int64, types.int64), generate

    return copy_line


copy_line = _line_copier(is_streaming=False)
stream_line = _line_copier(is_streaming=True)


@intrinsic
def end_streams(typing):
    """Let what was streamed be seen before what is stored from here on; a release alone does not do that on x86-64."""

    def generate(context, builder, signature, args):
        if builder.module.triple.startswith("x86_64"):
            name = "llvm.x86.sse.sfence"
            builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), []), name), [])
        else:
            builder.fence("seq_cst")

    return types.void(), generate


@intrinsic
def at(typing, address):
    """Return ``address`` as a pointer, which numba's carray makes an array of."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], BYTES)

    return types.voidptr(types.int64), generate


@intrinsic
def call_reducer(typing, function, sources, num_sources, targets, num_targets, count, scratch):
    """Call the compiled function at the address ``function``, see backends/shm/compiled/reducers.py."""

    def generate(context, builder, signature, args):
        reducer = ir.FunctionType(ir.VoidType(), [I64] * 6)
        builder.call(builder.inttoptr(args[0], reducer.as_pointer()), args[1:])

    return types.void(*[types.int64] * 7), generate


# Numbers of 16 bits, of which numba knows nothing -------------------------------------------------


@intrinsic
def bits_of(typing, value):
    """Return the bits of a float32 as uint32."""

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], I32)

    return types.uint32(types.float32), generate


@intrinsic
def float_of(typing, bits):
    """Return the float32 that has these bits, a uint32."""

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], F32)

    return types.float32(types.uint32), generate


@intrinsic
def float_of_half(typing, bits):
    """Return the float32 of a float16, a uint16 to numba."""

    def generate(context, builder, signature, args):
        return builder.fpext(builder.bitcast(args[0], HALF), F32)

    return types.float32(types.uint16), generate


@intrinsic
def half_of_float(typing, value):
    """Return the bits of the float16 next to a float32; ties go to the even one."""

    def generate(context, builder, signature, args):
        return builder.bitcast(builder.fptrunc(args[0], HALF), I16)

    return types.uint16(types.float32), generate
