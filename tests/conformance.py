"""What every communicator must do: the values that the operations leave on every rank.

Each ``check_<operation>_<property>(comm)`` is called by all ranks and raises on the rank that saw
something wrong. The order of operations is in conformance_order.py, failures in
conformance_faults.py; `harness` runs all three on the rows of `table`.

To run the suite on a communicator that lives elsewhere, give the dotted path of its class, or of
anything that makes one when it is called without arguments on each rank::

    pytest tests/test_conformance.py --comm my_package.MyCommunicator --comm-launcher torchrun --world-sizes 1,2,3,4

The launcher is torchrun, mpirun, thread (the ranks are threads of `backends.thread.spawn_threads`) or
none (one rank). ``-k all_reduce`` picks checks; ``--comm-lacks 'leaving=why'`` declares what it cannot do;
``--comm-device cuda`` makes all tensors there.
"""

from __future__ import annotations

import time

import pytest
import torch

from minidist.communicator import Communicator, ReduceOp
from minidist.contract import carriers, checks
from minidist.errors import CommError
from tests.inputs import (
    FLOATS,
    SENTINEL,
    assert_same,
    layouts,
    moves,
    needs,
    operand,
    reduced,
    reductions,
    sizes,
    tensor,
    untouched,
    wants_everything,
)


def check_group_is_whole(comm: Communicator) -> None:
    assert comm.all_gather_object((comm.rank, comm.world_size)) == [
        (rank, comm.world_size) for rank in range(comm.world_size)
    ]


# Reductions -----------------------------------------------------------------------------------


def check_all_reduce_values(comm: Communicator) -> None:
    n = comm.world_size
    for dtype, op, numel in reductions(sizes(n)):
        data = operand(comm.rank, numel, dtype, op, n)
        comm.all_reduce(data, op)
        assert_same(data, reduced(n, numel, dtype, op), "all_reduce", dtype, op, numel)


def check_all_reduce_layouts(comm: Communicator) -> None:
    n = comm.world_size
    for dtype in checks.DTYPES:
        op = ReduceOp.SUM if dtype.is_complex else ReduceOp.MAX
        values = operand(comm.rank, 1000, dtype, op, n)
        for layout, view, memory in layouts(values):
            before = untouched(memory)
            comm.all_reduce(view, op)
            assert_same(view, reduced(n, 1000, dtype, op), "all_reduce", dtype, layout)
            assert untouched(memory) == before, f"all_reduce {dtype} {layout}: wrote beside the view"


def check_all_reduce_same_bits_on_all_ranks(comm: Communicator) -> None:
    generator = torch.Generator(torch.get_default_device()).manual_seed(comm.rank)
    for dtype in FLOATS:
        for op in (ReduceOp.SUM, ReduceOp.AVG, ReduceOp.PRODUCT):
            data = torch.randn(4097, generator=generator, dtype=torch.float64).to(dtype)
            comm.all_reduce(data, op)
            bits = comm.all_gather_object(data.view(torch.uint8).cpu().numpy().tobytes())
            assert len(set(bits)) == 1, f"all_reduce {dtype} {op}: the ranks hold different bits"


def check_all_reduce_average_does_not_overflow(comm: Communicator) -> None:
    data = torch.full((10,), 32768.0, dtype=torch.float16)
    comm.all_reduce(data, ReduceOp.AVG)
    assert data.isfinite().all(), f"all_reduce AVG of 32768 in float16 gave {data}"


def check_all_reduce_spreads_nan(comm: Communicator) -> None:
    data = torch.ones(5)
    data[2] = float("nan") if comm.rank == comm.world_size - 1 else 1.0
    comm.all_reduce(data)
    assert data.isnan().tolist() == [False, False, True, False, False]


@needs(once=True)
def check_all_reduce_large(comm: Communicator) -> None:
    places = torch.arange(2 ** (24 if wants_everything() else 22) + 1) % 4099  # what is in another's place is seen
    data = (places + comm.rank).float()
    comm.all_reduce(data)
    places.mul_(comm.world_size).add_(sum(range(comm.world_size)))
    assert torch.equal(data, places.float()), f"{data.nbytes} B: wrong at {(data != places).nonzero()[:5].tolist()}"


def check_all_reduce_of_a_leaf_that_requires_grad(comm: Communicator) -> None:
    data = tensor(comm.rank, 12).requires_grad_()
    comm.all_reduce(data)
    assert data.is_leaf
    assert data.requires_grad
    assert data.grad_fn is None
    assert_same(data, reduced(comm.world_size, 12, torch.float32, ReduceOp.SUM), "all_reduce of a leaf")


def check_views_that_are_conjugate_or_negative(comm: Communicator) -> None:
    """Such a view is a mark on the values of another tensor; what travels is what it shows."""
    n = comm.world_size
    for numel in (10, 3000):
        for dtype in (torch.complex64, torch.complex128):
            mine, everyone = tensor(comm.rank, numel, dtype), [tensor(rank, numel, dtype) for rank in range(n)]
            data, total = mine.clone(), reduced(n, numel, dtype, ReduceOp.SUM)
            comm.all_reduce(data.conj())
            assert_same(data, total, "all_reduce of a conjugate", dtype, numel)
            data = mine.clone()
            comm.all_reduce(data.conj().imag)
            assert_same(data, torch.complex(mine.real, total.imag), "all_reduce of a negative view", dtype, numel)
            data = mine.clone()
            comm.broadcast(data.conj() if comm.rank == 0 else data, 0)
            expected = mine if comm.rank == 0 else everyone[0].conj().resolve_conj()
            assert_same(data, expected, "broadcast from a conjugate", dtype, numel)
            output = torch.zeros(n * numel, dtype=dtype)
            comm.all_gather(output.conj(), mine.clone().conj())
            assert_same(output, torch.cat(everyone), "all_gather of conjugates into a conjugate", dtype, numel)
            comm.all_to_all(output, torch.cat(everyone).conj())
            expected = mine.conj().resolve_conj().repeat(n)
            assert_same(output, expected, "all_to_all of conjugates", dtype, numel)


def check_reductions_of_dtypes_that_backends_do_not_know(comm: Communicator) -> None:
    """They wrap around, or are rounded once, as if they had been combined in one step."""
    n, rank = comm.world_size, comm.rank
    for dtype, wider in carriers.WIDER.items():
        values = [(torch.arange(3 * n) * 40 + 90 * r).to(torch.int32).to(wider).to(dtype) for r in range(n)]
        expected = torch.stack([value.to(wider) for value in values]).sum(0, dtype=wider).to(dtype)
        data = values[rank].clone()
        comm.all_reduce(data, async_op=True).wait()
        assert_same(data.view(torch.uint8), expected.view(torch.uint8), "all_reduce", dtype)
        data = values[rank].repeat_interleave(2)[::2]
        comm.reduce(data, n - 1)
        wanted = expected if rank == n - 1 else values[rank]
        assert_same(data.contiguous().view(torch.uint8), wanted.view(torch.uint8), "reduce", dtype)
        block = values[rank].new_zeros(3)
        comm.reduce_scatter(block, values[rank])
        assert_same(block.view(torch.uint8), expected.view(n, 3)[rank].view(torch.uint8), "reduce_scatter", dtype)


def check_moves_of_dtypes_that_backends_do_not_know(comm: Communicator) -> None:
    n, rank = comm.world_size, comm.rank

    def brought(by: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return (torch.arange(numel * dtype.itemsize) * 7 + by).to(torch.uint8).view(dtype)

    for turn, dtype in enumerate(sorted(carriers.CARRIED, key=str)):
        everyone = [brought(r, 4, dtype) for r in range(n)]
        output = brought(99, 4 * n, dtype)
        comm.all_gather(output, everyone[rank])
        assert_same(output.view(torch.uint8), torch.cat([e.view(torch.uint8) for e in everyone]), "all_gather", dtype)
        data = brought(rank, 8, dtype)[::2]
        comm.broadcast(data, turn % n)
        wanted = brought(turn % n, 8, dtype)[::2].contiguous()
        assert_same(data.contiguous().view(torch.uint8), wanted.view(torch.uint8), "broadcast", dtype)
        output = brought(99, n, dtype)
        comm.all_to_all(output, brought(rank, n, dtype))
        wanted = torch.cat([brought(r, n, dtype)[rank : rank + 1].view(torch.uint8) for r in range(n)])
        assert_same(output.view(torch.uint8), wanted, "all_to_all", dtype)
        if n > 1:
            sent = comm.isend(everyone[rank], (rank + 1) % n)
            comm.recv(received := brought(99, 8, dtype)[::2], (rank - 1) % n)
            sent.wait()
            wanted = everyone[(rank - 1) % n]
            assert_same(received.contiguous().view(torch.uint8), wanted.view(torch.uint8), "recv", dtype)


def check_reduce_values(comm: Communicator) -> None:
    n = comm.world_size
    for dtype, op, numel in reductions((1, n + 1, 1000)):
        dst = numel % n
        data = operand(comm.rank, numel, dtype, op, n)
        comm.reduce(data, dst, op)
        own = operand(comm.rank, numel, dtype, op, n)
        expected = reduced(n, numel, dtype, op) if comm.rank == dst else own
        assert_same(data, expected, "reduce", dtype, op, numel, "to", dst)


def check_reduce_layouts(comm: Communicator) -> None:
    n = comm.world_size
    for dst in range(n):
        own = operand(comm.rank, 1000, torch.float32, ReduceOp.SUM, n)
        for layout, view, memory in layouts(own):
            before = untouched(memory)
            comm.reduce(view, dst)
            expected = reduced(n, 1000, torch.float32, ReduceOp.SUM) if comm.rank == dst else own
            assert_same(view, expected, "reduce", layout, "to", dst)
            assert untouched(memory) == before, f"reduce {layout}: wrote beside the view"


def check_reduce_scatter_values(comm: Communicator) -> None:
    n = comm.world_size
    for dtype, op, numel in reductions((1, n + 1, 1000)):
        data = operand(comm.rank, n * numel, dtype, op, n)
        before = data.clone()
        output = torch.full((numel,), 1).to(dtype)
        comm.reduce_scatter(output, data, op)
        expected = reduced(n, n * numel, dtype, op).view(n, numel)[comm.rank]
        assert_same(output, expected, "reduce_scatter", dtype, op, numel)
        assert_same(data, before, "reduce_scatter: input of", dtype, op, numel)


def check_reduce_scatter_layouts(comm: Communicator) -> None:
    n = comm.world_size
    values = operand(comm.rank, n * 100, torch.float32, ReduceOp.SUM, n)
    expected = reduced(n, n * 100, torch.float32, ReduceOp.SUM).view(n, 100)[comm.rank]
    for layout, view, memory in layouts(values):
        for target, output, _ in layouts(torch.zeros(100)):
            before = memory.clone()
            comm.reduce_scatter(output, view)
            assert_same(output, expected, "reduce_scatter", layout, "to", target)
            assert_same(memory, before, "reduce_scatter: input", layout)


# Moves ----------------------------------------------------------------------------------------


def check_broadcast_values(comm: Communicator) -> None:
    for dtype, numel, src in moves(sizes(comm.world_size), range(comm.world_size)):
        data = tensor(comm.rank, numel, dtype, salt=src)
        comm.broadcast(data, src)
        assert_same(data, tensor(src, numel, dtype, salt=src), "broadcast", dtype, numel, "from", src)


def check_broadcast_layouts(comm: Communicator) -> None:
    for src in range(comm.world_size):
        for layout, view, memory in layouts(tensor(comm.rank, 1000)):
            before = untouched(memory)
            comm.broadcast(view, src)
            assert_same(view, tensor(src, 1000), "broadcast", layout)
            assert untouched(memory) == before, f"broadcast {layout}: wrote beside the view"


def check_all_gather_values(comm: Communicator) -> None:
    n = comm.world_size
    for dtype in checks.DTYPES:
        for numel in sizes(n):
            output = torch.zeros(n * numel, dtype=dtype)
            comm.all_gather(output, tensor(comm.rank, numel, dtype))
            expected = torch.cat([tensor(rank, numel, dtype) for rank in range(n)])
            assert_same(output, expected, "all_gather", dtype, numel)


def check_all_gather_layouts(comm: Communicator) -> None:
    n = comm.world_size
    expected = torch.cat([tensor(rank, 100) for rank in range(n)])
    for layout, view, _ in layouts(tensor(comm.rank, 100)):
        for target, output, memory in layouts(torch.zeros(n * 100)):
            before = untouched(memory)
            comm.all_gather(output, view)
            assert_same(output, expected, "all_gather", layout, "to", target)
            assert untouched(memory) == before, f"all_gather to {target}: wrote beside the view"


def check_all_gather_shapes(comm: Communicator) -> None:
    n = comm.world_size
    output = torch.zeros(n, 2, 3)
    comm.all_gather(output, tensor(comm.rank, 6).view(3, 2))
    assert_same(output, torch.cat([tensor(rank, 6) for rank in range(n)]), "all_gather of (3, 2) into (n, 2, 3)")


def check_gather_values(comm: Communicator) -> None:
    n = comm.world_size
    for dtype, numel, dst in moves((1, n + 1, 1000), range(n)):
        output = torch.zeros(n * numel, dtype=dtype) if comm.rank == dst else None
        comm.gather(output, tensor(comm.rank, numel, dtype), dst)
        if output is not None:
            expected = torch.cat([tensor(rank, numel, dtype) for rank in range(n)])
            assert_same(output, expected, "gather", dtype, numel, "to", dst)


def check_scatter_values(comm: Communicator) -> None:
    n = comm.world_size
    for dtype, numel, src in moves((1, n + 1, 1000), range(n)):
        data = tensor(src, n * numel, dtype)
        output = torch.zeros(numel, dtype=dtype)
        comm.scatter(output, data if comm.rank == src else None, src)
        assert_same(output, data.view(n, numel)[comm.rank], "scatter", dtype, numel, "from", src)


def check_all_to_all_values(comm: Communicator) -> None:
    n = comm.world_size
    for dtype in checks.DTYPES:
        for numel in (0, 1, n + 1, 1000):
            output = torch.zeros(n * numel, dtype=dtype)
            comm.all_to_all(output, tensor(comm.rank, n * numel, dtype))
            expected = torch.cat([tensor(rank, n * numel, dtype).view(n, -1)[comm.rank] for rank in range(n)])
            assert_same(output, expected, "all_to_all", dtype, numel)


def check_uneven_blocks(comm: Communicator) -> None:
    """Rank r brings, or gets, r + 1 elements, or none at all if it is the first."""
    n, rank = comm.world_size, comm.rank
    for numels in ([r + 1 for r in range(n)], list(range(n))):
        for dtype in (torch.float32, torch.int16):
            everyone = [tensor(r, numels[r], dtype) for r in range(n)]
            memory = torch.full((2 * sum(numels),), SENTINEL, dtype=dtype)
            comm.all_gather(memory[::2], everyone[rank], sizes=numels)
            assert_same(memory[::2], torch.cat(everyone), "all_gather", dtype, numels)
            assert untouched(memory) == sum(numels)
            whole = [tensor(r, sum(numels), dtype) for r in range(n)]
            block = whole[rank].new_zeros(numels[rank])
            work = comm.reduce_scatter(block, whole[rank], ReduceOp.MAX, async_op=True, sizes=numels)
            work.wait()
            expected = torch.stack(whole).amax(0).split_with_sizes(numels)[rank]
            assert_same(block, expected, "reduce_scatter", dtype, numels)
            assert_same(whole[rank], tensor(rank, sum(numels), dtype), "reduce_scatter: the input", dtype)
            output = whole[rank].new_zeros(n * numels[rank])
            comm.all_to_all(output, whole[rank], output_sizes=[numels[rank]] * n, input_sizes=numels)
            blocks = [each.split_with_sizes(numels)[rank] for each in whole]
            assert_same(output, torch.cat(blocks), "all_to_all", dtype, numels)


def check_uneven_blocks_in_one_memory(comm: Communicator) -> None:
    """What is sent are the values from before, also where others are written."""
    n, rank = comm.world_size, comm.rank
    data = tensor(rank, 2 * n)
    comm.all_to_all(data, data, output_sizes=[2] * n, input_sizes=[2] * n)
    assert_same(data, torch.cat([tensor(r, 2 * n)[2 * rank : 2 * rank + 2] for r in range(n)]), "all_to_all")


def check_one_element_of_a_strided_view(comm: Communicator) -> None:
    """It counts as contiguous, whatever its stride is."""
    n, rank = comm.world_size, comm.rank
    for dtype in (*checks.DTYPES, torch.int16):
        data = tensor(rank, 2, dtype)[::2]
        comm.broadcast(data, n - 1)
        assert_same(data, tensor(n - 1, 2, dtype)[:1], "broadcast", dtype)
        output = tensor(rank, n, dtype)
        comm.all_gather(output, tensor(rank, 2, dtype)[::2])
        assert_same(output, torch.cat([tensor(r, 2, dtype)[:1] for r in range(n)]), "all_gather", dtype)
        if n > 1:
            sent = comm.isend(tensor(rank, 2, dtype)[::2], (rank + 1) % n)
            comm.recv(data, (rank - 1) % n)
            sent.wait()
            assert_same(data, tensor((rank - 1) % n, 2, dtype)[:1], "recv", dtype)


def check_rooted_layouts(comm: Communicator) -> None:
    n = comm.world_size
    gathered = torch.cat([tensor(rank, 100) for rank in range(n)])
    for layout, view, _ in layouts(tensor(comm.rank, 100)):
        for target, many, memory in layouts(torch.zeros(n * 100)):
            before = untouched(memory)
            comm.gather(many if comm.rank == 0 else None, view, 0)
            if comm.rank == 0:
                assert_same(many, gathered, "gather", layout, "to", target)
            comm.scatter(view, many if comm.rank == 0 else None, 0)
            assert_same(view, tensor(comm.rank, 100), "scatter", target, "to", layout)
            assert untouched(memory) == before, f"gather to {target}: wrote beside the view"


def check_objects(comm: Communicator) -> None:
    mine = {"rank": comm.rank, "text": "ä" * 1000 * comm.rank, "none": None}
    everyone = [{"rank": r, "text": "ä" * 1000 * r, "none": None} for r in range(comm.world_size)]
    assert comm.all_gather_object(mine) == everyone
    for src in range(comm.world_size):
        assert comm.broadcast_object(mine, src) == everyone[src]


class _Unpicklable:
    """An object that gives its reason."""

    def __reduce__(self) -> str | tuple:
        raise RuntimeError("the socket is open")


def _explode(*_: object) -> object:
    raise KeyError("no such module here")


class _Explosive:
    """An object that can be pickled and not unpickled."""

    def __reduce__(self) -> str | tuple:
        return _explode, ()


def check_only_the_source_of_an_object_is_pickled(comm: Communicator) -> None:
    for src in range(comm.world_size):
        obj = "mine" if comm.rank == src else _Unpicklable()
        assert comm.broadcast_object(obj, src) == "mine"


def check_an_object_that_cannot_be_pickled_is_named_on_all_ranks(comm: Communicator) -> None:
    for victim in range(comm.world_size):
        obj = _Unpicklable() if comm.rank == victim else "x" * 100
        for call in (lambda: comm.broadcast_object(obj, victim), lambda: comm.all_gather_object(obj)):  # noqa: B023
            with pytest.raises(TypeError if comm.rank == victim else CommError, match="the socket is open") as caught:
                call()
            who = "obj cannot" if comm.rank == victim else f"rank {victim} has an object that cannot"
            assert str(caught.value).startswith(f"[rank {comm.rank}/{comm.world_size}] ")
            assert f"{who} be pickled: RuntimeError" in str(caught.value)
    assert comm.all_gather_object(comm.rank) == list(range(comm.world_size)), "the communicator goes on"


def check_an_object_that_cannot_be_unpickled_is_named(comm: Communicator) -> None:
    last = comm.world_size - 1
    obj = _Explosive() if comm.rank == last else "x" * 100
    with pytest.raises(CommError, match=rf"object of rank {last} cannot be unpickled here: KeyError: 'no such module"):
        comm.all_gather_object(obj)
    if comm.rank == last:
        assert comm.broadcast_object(obj, last) is obj
    else:
        with pytest.raises(CommError, match=f"broadcast_object: the object of rank {last} cannot be unpickled here"):
            comm.broadcast_object(obj, last)
    comm.barrier()


def check_barrier_waits_for_all(comm: Communicator) -> None:
    time.sleep(0.01 * comm.rank)  # the ranks come at different times
    entered = time.monotonic()
    comm.barrier()
    left = time.monotonic()
    times = comm.all_gather_object((entered, left))
    assert max(t[0] for t in times) <= min(t[1] for t in times), f"(entered, left) by rank: {times}"


def check_nothing_of_no_elements(comm: Communicator) -> None:
    nothing, bytes_before = torch.empty(0, 3), comm.traffic.bytes
    comm.all_reduce(nothing)
    comm.reduce(nothing, 0)
    comm.broadcast(nothing, 0)
    comm.all_gather(nothing, nothing)
    comm.reduce_scatter(nothing, nothing.clone())
    comm.gather(nothing if comm.rank == 0 else None, nothing, 0)
    comm.scatter(nothing, nothing if comm.rank == 0 else None, 0)
    comm.all_to_all(nothing, nothing.clone())
    assert comm.traffic.bytes == bytes_before


def check_empty_is_usable_memory(comm: Communicator) -> None:
    for shape, dtype in (
        ((3, 4), torch.float32),
        (5, torch.int64),
        ((0,), torch.bfloat16),
        ((7,), torch.complex64),
        ((), torch.float64),
    ):
        memory = comm.empty(shape, dtype)
        assert memory.dtype == dtype
        assert memory.shape == torch.empty(shape).shape
        comm.all_reduce(memory.fill_(1))
        assert (memory == comm.world_size).all()


def check_wrong_arguments_send_nothing(comm: Communicator) -> None:
    """A rank that was refused takes part in the next operation as if nothing had been."""
    wrong = (
        lambda: comm.all_reduce(torch.ones(2, dtype=torch.int32), ReduceOp.AVG),
        lambda: comm.broadcast(torch.ones(2), comm.world_size),
        lambda: comm.all_gather(torch.ones(comm.world_size + 1), torch.ones(1)),
        lambda: comm.all_reduce(torch.ones(1).expand(SENTINEL)),
        lambda: comm.all_gather(torch.ones(comm.world_size + 1), torch.ones(1), sizes=[1] * comm.world_size),
    )
    for call in wrong:
        if comm.rank == 0:
            with pytest.raises((TypeError, ValueError), match=r"^\[rank 0/"):
                call()
        data = torch.ones(3)
        comm.all_reduce(data)
        assert (data == comm.world_size).all()


# Tensors that share memory --------------------------------------------------------------------


def _numbers(rank: int, numel: int) -> torch.Tensor:
    return torch.arange(numel, dtype=torch.float32) + 10_000 * rank


PLACES = {
    "in its own block": lambda rank, n, size: rank * size,
    "in the next block": lambda rank, n, size: (rank + 1) % n * size,
    "in the first block": lambda rank, n, size: 0,
    "between two blocks": lambda rank, n, size: rank * size + 1,
    "half outside": lambda rank, n, size: n * size - size // 2,
}
"""Where in memory of n + 1 blocks the smaller tensor of a collective begins, whose larger one is the first n."""


def check_all_to_all_of_overlapping_tensors(comm: Communicator) -> None:
    n = comm.world_size
    for size in (2, 3000):
        before = [_numbers(rank, (n + 2) * size) for rank in range(n)]
        for shift in (-size, -1, 0, 1, size):
            memory = before[comm.rank].clone()
            input, output = memory[size : (n + 1) * size], memory[size + shift : (n + 1) * size + shift]
            comm.all_to_all(output, input)
            expected = torch.cat([memory[size:].view(n + 1, size)[comm.rank] for memory in before])
            assert_same(output, expected, "all_to_all,", shift, "elements behind an input of blocks of", size)


def check_all_gather_of_overlapping_tensors(comm: Communicator) -> None:
    n = comm.world_size
    for size in (4, 3000):
        before = [_numbers(rank, (n + 1) * size) for rank in range(n)]
        for where, at in PLACES.items():
            starts, memory = [at(rank, n, size) for rank in range(n)], before[comm.rank].clone()
            comm.all_gather(memory[: n * size], memory[starts[comm.rank] : starts[comm.rank] + size])
            expected = torch.cat([old[start : start + size] for old, start in zip(before, starts, strict=True)])
            assert_same(memory[: n * size], expected, "all_gather of", size, where)


def check_reduce_scatter_of_overlapping_tensors(comm: Communicator) -> None:
    n = comm.world_size
    for op in (ReduceOp.SUM, ReduceOp.AVG):
        for size in (4, 3000):
            before = [_numbers(rank, (n + 1) * size) * n for rank in range(n)]
            sums = torch.stack([old[: n * size].view(n, size)[comm.rank] for old in before]).sum(0)
            for where, at in PLACES.items():
                start, memory = at(comm.rank, n, size), before[comm.rank].clone()
                comm.reduce_scatter(memory[start : start + size], memory[: n * size], op)
                expected = before[comm.rank].clone()
                expected[start : start + size] = sums / n if op is ReduceOp.AVG else sums
                assert_same(memory, expected, "reduce_scatter", op, "of", size, where)


def check_rooted_of_overlapping_tensors(comm: Communicator) -> None:
    n = comm.world_size
    for size in (4, 3000):
        before = [_numbers(rank, (n + 1) * size) for rank in range(n)]
        for where, at in PLACES.items():
            root = n - 1
            start, memory = at(comm.rank, n, size), before[comm.rank].clone()
            many, one = memory[: n * size] if comm.rank == root else None, memory[start : start + size]
            comm.gather(many, one, root)
            if many is not None:
                starts = [at(rank, n, size) for rank in range(n)]
                expected = torch.cat([old[at : at + size] for old, at in zip(before, starts, strict=True)])
                assert_same(many, expected, "gather of", size, where)
                many.copy_(before[root][: n * size])
            comm.scatter(one, many, root)
            assert_same(one, before[root][: n * size].view(n, size)[comm.rank], "scatter of", size, where)


def check_views_of_overlapping_tensors(comm: Communicator) -> None:
    """Input and output are neither contiguous nor apart, or share memory and no element."""
    n = comm.world_size
    before = [_numbers(rank, 4 * n * 50) for rank in range(n)]
    for name, first, second in (("interleaved", 0, 1), ("shifted", 0, 2), ("same", 0, 0)):
        memory = before[comm.rank].clone()
        input, output = memory[first::2][: n * 50], memory[second::2][: n * 50]
        comm.all_to_all(output, input)
        expected = torch.cat([old[first::2][: n * 50].view(n, 50)[comm.rank] for old in before])
        assert_same(output, expected, "all_to_all of", name, "views")
        memory = before[comm.rank].clone()
        output, input = memory[first::2][: n * 50], memory[second::2][:50]
        comm.all_gather(output, input)
        assert_same(output, torch.cat([old[second::2][:50] for old in before]), "all_gather of", name, "views")


def check_input_may_overlap_itself(comm: Communicator) -> None:
    n = comm.world_size
    output, windows = torch.zeros(n * 12), (torch.arange(6.0) + comm.rank).as_strided((4, 3), (1, 1))
    comm.all_gather(output, windows)
    everyone = [(torch.arange(6.0) + rank).as_strided((4, 3), (1, 1)).reshape(-1) for rank in range(n)]
    assert_same(output, torch.cat(everyone), "all_gather of overlapping windows")
    one = torch.zeros(5)
    comm.reduce_scatter(one, torch.full((1,), comm.rank + 1.0).expand(n * 5))
    assert_same(one, torch.full((5,), n * (n + 1) / 2), "reduce_scatter of an expanded tensor")


def check_async_operations_on_one_tensor(comm: Communicator) -> None:
    """Each reads what the one before it has left, an average too."""
    n = comm.world_size
    for numel in (5, 70_000):
        data, output = torch.full((numel,), comm.rank + 1.0), torch.zeros(numel)
        works = [comm.all_reduce(data, async_op=True), comm.all_reduce(data, ReduceOp.AVG, async_op=True)]
        works.append(comm.reduce(data, 0, async_op=True))
        works.append(comm.broadcast(data, 0, async_op=True))
        works.append(comm.reduce_scatter(output, torch.empty(0).new_empty(n * numel).fill_(n), ReduceOp.AVG, True))
        works.append(comm.all_reduce(output, ReduceOp.AVG, async_op=True))
        for work in works:
            work.wait()
        total = n * (n + 1) / 2
        assert_same(data, torch.full((numel,), total * n), "four operations on", numel)
        assert_same(output, torch.full((numel,), float(n)), "an average of an average of", numel)
