"""The collectives of one rank on the compiled path: a desk, a plan for each kind of call, and who waits for whom."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from backends.cores import SPIN_S
from backends.deadline import Deadline
from backends.processes.signature import STEP, pack
from backends.shm import roles
from backends.shm.arena import Arena
from backends.shm.compiled import desk, step_words
from backends.shm.compiled.loading import Kernel, Kernels
from backends.shm.compiled.table import table
from backends.shm.compiled.wholes import Whole, WholeMemory
from backends.shm.compiled.words import Words
from backends.shm.layout import share
from backends.shm.roles import Call
from backends.shm.script import scripts
from minidist.collective import COLLECTIVES, Run
from minidist.communicator import ReduceOp
from minidist.contract.fused_step import FusedStep, Row
from minidist.schedule import Schedule, chunks_of

SPINS = 2000
"""Looks before the first clock; some 50 us."""
CROWDED_S = 1e-3
"""How long ranks without a core each pass theirs on before they sleep."""
Patience = tuple[int, int]
"""How often a kernel looks, and how many ns it then passes its core on, before it returns to Python."""
ALONE: Patience = SPINS, int(SPIN_S * 1e9)
CROWDED: Patience = 0, int(CROWDED_S * 1e9)
BESIDE: Patience = 0, 0
"""Who passes its core on to its own rank's computation gets it back late; who sleeps is woken."""


class CompiledCollectives:
    """The collectives of shared memory as compiled kernels.

    Args:
        arena: what the ranks share; it lives as long as a kernel runs, as does everything whose address is on the desk.
        kernels: of this process.
    """

    def __init__(self, arena: Arena, kernels: Kernels) -> None:
        self._arena = arena
        self._kernels = kernels
        self._scratch = (ctypes.c_char * kernels.scratch_bytes)()
        self._desk = self._make_desk()
        self._patience = ALONE
        # A function, not a method, is cached; a method would hold this object, and so all heaps, in a circle.
        self._plan = functools.lru_cache(4096)(functools.partial(_make_plan, kernels, arena.rank, arena.world_size))
        self._scripts = functools.lru_cache(256)(scripts)
        self._barrier = Words([0])
        self._memory = WholeMemory(arena)

    def _make_desk(self) -> Words:
        arena = self._arena
        n = arena.world_size
        fields = {
            desk.RANK: arena.rank,
            desk.WORLD_SIZE: n,
            desk.SIZE: arena.heap.size,
            desk.SPINS: ALONE[0],
            desk.PATIENCE_NS: ALONE[1],
            desk.INLINE: arena.places.inline,
            desk.STAGE: arena.places.stage,
            desk.SCRATCH: ctypes.addressof(self._scratch),
            desk.CHIME: 2 * arena.rank + 1,
        }
        heaps = [heap.base for heap in arena.heaps]
        words = [base + arena.places.words for base in heaps]
        space = [0] * (3 * n)
        return Words([*(fields.get(8 * field, 0) for field in range(desk.NUM_FIELDS)), *heaps, *words, *space])

    def all_reduce(self, flat: Tensor, op: ReduceOp, timeout_s: float) -> None:
        """Combine the tensors of all ranks, in place."""
        plan = self._plan("all_reduce", flat.numel(), flat.dtype, op, 0)
        self._run(self._kernels.all_reduce, plan, 0, flat.data_ptr(), timeout_s)

    def share(self, call: Call, timeout_s: float) -> None:
        """Run any other collective."""
        plan = self._plan(call.kind, call.numel, call.like.dtype, call.op, call.root)
        source, target = (0 if each is None else each.data_ptr() for each in (call.source, call.target))
        self._run(self._kernels.share, plan, source, target, timeout_s)

    def barrier(self, timeout_s: float) -> None:
        """Meet."""
        self._run(self._kernels.barrier, self._barrier, 0, 0, timeout_s)

    def whole(self, schedule: Schedule, run: Run, numel: int, dtype: torch.dtype, channel: int) -> Whole | None:
        """Return a schedule on tensors of a shape as what `run_whole` takes; None if it has to run over messages."""
        written = self._scripts(schedule, run)
        if written is None:
            return None
        num_chunks = chunks_of(schedule, run.name, run.world_size)
        made = table(*written, run, num_chunks, self._arena.rank, numel, dtype.itemsize)
        if made is None:
            return None
        _ = self._kernels.schedule  # compiled now, at the first use on a machine, and not while the others wait in it
        return Whole(made, run.name, numel, dtype, run.root, channel, self._kernels)

    def run_whole(self, whole: Whole, regions: Sequence[Tensor], op: ReduceOp, timeout_s: float) -> None:
        """Run a schedule, on memory as backends/executor/layout.py has it."""
        memory = self._memory.of(whole.table, regions)
        self._run(self._kernels.schedule, whole.words(op), memory, 0, timeout_s)

    def step(self, step: FusedStep, timeout_s: float) -> None:
        """Reduce, step and gather; see backends/shm/compiled/step.py."""
        numel = step.memory.numel() // (2 * self._arena.world_size)
        itemsize = step.memory.itemsize
        kind = step_words.SGD if step.kind == "sgd" else step_words.ADAM
        signature = pack(STEP, numel, step.memory.dtype, ReduceOp.SUM, kind)
        reducer = self._kernels.reducer(step.memory.dtype, ReduceOp.SUM)
        rows = [word for row in step.rows for word in _row(row, step.divisor, itemsize)]
        plan = Words([signature, reducer, numel * itemsize, itemsize, kind, len(step.rows), *rows])
        self._run(self._kernels.step, plan, step.memory.data_ptr(), 0, timeout_s)

    def without_meetings(self, tensor: Tensor, timeout_s: float) -> Callable[[], None]:
        """Return what an all-reduce in place does on ``tensor`` between its meetings; all ranks call it."""
        plan = self._plan("all_reduce", tensor.numel(), tensor.dtype, ReduceOp.SUM, 0)
        arena = self._arena
        offsets = arena.gather_offsets(plan.view[0], arena.heap.offset_of(tensor), Deadline(timeout_s))
        words = self._make_desk()  # its own: the tables stay as they are
        begin, _ = share(tensor.numel(), tensor.element_size(), arena.world_size, arena.rank)
        for place, rank in enumerate(roles.own_first(arena.rank, arena.world_size)):
            for tensors in (desk.SOURCES, desk.TARGETS):
                start = arena.heaps[rank].base + offsets[rank] + begin * tensor.element_size()
                words.view[desk.NUM_FIELDS + tensors * arena.world_size + place] = start
        reduce_share = self._kernels.reduce_share

        def run() -> None:
            assert tensor is not None  # it has to live as long as this
            reduce_share(words.address, plan.address, 0, 0)

        return run

    def _run(self, kernel: Kernel, plan: Words, source: int, target: int, timeout_s: float) -> None:
        """Call a kernel until it is done; in between, look after what else keeps a rank from coming."""
        self._be_patient()
        if kernel(self._desk.address, plan.address, source, target) == desk.DONE:
            return
        deadline = Deadline(timeout_s)
        while True:
            self._wait_as_told(deadline)
            if kernel(self._desk.address, plan.address, source, target) == desk.DONE:
                return

    def _be_patient(self) -> None:
        """Tell kernels how long they may wait on the core of the thread that calls them."""
        patience = ALONE if self._arena.has_core else CROWDED if self._arena.cores_per_rank == 0 else BESIDE
        if patience is not self._patience:
            self._patience = patience
            self._desk.view[desk.SPINS // 8], self._desk.view[desk.PATIENCE_NS // 8] = patience

    def _wait_as_told(self, deadline: Deadline) -> None:
        """Wait for the rank that the kernel was waiting for, or raise why it need not be waited for."""
        told = self._desk.view
        self._arena.wait_for_word(told[desk.PEER // 8], told[desk.WORD // 8], told[desk.GOAL // 8], deadline)


def _make_plan(
    kernels: Kernels, rank: int, world_size: int, kind: str, numel: int, dtype: torch.dtype, op: ReduceOp, root: int
) -> Words:
    """Write down what a collective is; see backends/shm/compiled/desk.py."""
    nbytes = numel * dtype.itemsize
    reduces = kind in ("all_reduce", "reduce", "reduce_scatter")
    itemsize = kernels.itemsize(dtype) if reduces else 1
    reducer = kernels.reducer(dtype, op) if reduces else 0
    reads = () if kind == "all_reduce" else roles.reads(kind, rank, world_size, root)
    source_root = root if COLLECTIVES[kind].root == "source" else desk.EVERYBODY
    head = (
        pack(kind, numel, dtype, op, root),
        reducer,
        nbytes,
        itemsize,
        roles.num_pieces(kind, world_size),
        source_root,
        len(reads),
    )
    return Words([*head, *_spelt(reads, nbytes)])


def _row(row: Row, divisor: int, itemsize: int) -> Iterable[int]:
    """Spell the step of some elements as words; see backends/shm/compiled/step_words.py."""
    addresses = [state.data_ptr() for state in row.states]
    numbers = [1 / divisor, *row.numbers]
    spelt = struct.pack(f"{step_words.NUM_NUMBERS}d", *numbers, *[0.0] * (step_words.NUM_NUMBERS - len(numbers)))
    yield from (row.start * itemsize, row.numel * itemsize, *addresses, *[0] * (2 - len(addresses)))
    yield from struct.unpack(f"{step_words.NUM_NUMBERS}q", spelt)


def _spelt(reads: Iterable[roles.Read], nbytes: int) -> list[int]:
    words: list[int] = []
    for block, parts in reads:
        words += [block * nbytes, len(parts), *(number for part in parts for number in part)]
    return words
