"""Runs schedules on tensors, over nothing but a send and a receive.

A schedule becomes a plan for the number of ranks, and that a *program* for the shape of the tensors, which is kept: its
messages, each cut into *segments*, and where they lie. The executor runs it step by step: it posts the receives and the
sends of a step together, and combines a segment that has arrived while the next ones are still on their way::

    step      | irecv s0 s1 s2 | isend s0 s1 s2 | wait s0, add s0 | wait s1, add s1 | ...

Chunks that lie side by side are one piece of memory; others that travel together are packed where they are small, and
go one by one where they are not. What is not received in place waits in scratch memory that is kept between calls,
because fresh pages cost more than the copy into them. Where it is safe, the receives of the next step are posted before
this one has ended. Chunks without elements (fewer elements than chunks) are skipped on both sides.

A transport that can do better than message by message is given the whole of a program, see `Membership._whole`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from backends.deadline import Deadline
from backends.executor.arrivals import Arrival, store, store_in_order
from backends.executor.plan import Plan, ensure_right, planned
from backends.executor.program import Program, ProgramStep, Whole, program
from backends.executor.scratch import Scratch
from minidist.collective import Run
from minidist.communicator import ReduceOp, Work
from minidist.contract.inner import Inner
from minidist.schedule import Schedule

SUM = ReduceOp.SUM
MAX_PROGRAMS = 256
"""How many shapes are kept."""


class Executor:
    """Every collective that there is a schedule for, over the messages of a transport.

    A method per collective, with the arguments that the hooks of a communicator have: the tensors, the root, the op and
    the seconds that it may take. Which memory the chunks of a schedule name stands in `minidist.schedule`.

    Args:
        transport: sends and receives.
        schedules: by the name of the collective.
        tag: of its messages, with the channel.
        segment_bytes: the largest message; what is larger travels in segments. The same on all ranks.
        proves: whether a schedule is proved before it first touches a tensor.

    Attributes:
        schedules, tag: see above.
        scratch: the memory that is kept between calls.
    """

    def __init__(
        self, transport: Inner, schedules: Mapping[str, Schedule], tag: int, segment_bytes: int, proves: bool
    ) -> None:
        self._transport = transport
        self.schedules = schedules
        self._proves = proves
        self.tag = tag
        self._segment_bytes = segment_bytes
        self._rank = transport.comm.rank
        self._world_size = transport.comm.world_size
        self.scratch = Scratch(transport.comm.empty)
        self.plan = functools.cache(self._make_plan)
        self._program = functools.lru_cache(MAX_PROGRAMS)(self._make_program)

    def _make_plan(self, collective: str, root: int = 0) -> Plan:
        """Work out this rank's steps; every rank does so when it first comes here, before anything is sent."""
        schedule = self.schedules[collective]
        run = Run(collective, self._world_size, root)
        if self._proves:
            ensure_right(schedule, run, self._rank)
        return planned(schedule, run, self._rank)

    def _make_program(self, collective: str, numel: int, dtype: torch.dtype, root: int = 0) -> Program:
        """Work out what this rank does on tensors of a shape."""
        plan = self.plan(collective, root)
        whole = self._transport.whole(self.schedules[collective], plan.run, numel, dtype, self.tag)
        return program(plan, self._rank, numel, self._segment_bytes // dtype.itemsize, whole)

    # Collectives ------------------------------------------------------------------------------

    def all_reduce(self, tensor: Tensor, op: ReduceOp, timeout_s: float) -> None:
        self._run(self._program("all_reduce", tensor.numel(), tensor.dtype), [tensor], op, timeout_s)

    def reduce(self, tensor: Tensor, dst: int, op: ReduceOp, timeout_s: float) -> None:
        self._run(self._program("reduce", tensor.numel(), tensor.dtype, dst), [tensor], op, timeout_s)

    def broadcast(self, tensor: Tensor, src: int, timeout_s: float) -> None:
        self._run(self._program("broadcast", tensor.numel(), tensor.dtype, src), [tensor], SUM, timeout_s)

    def all_gather(self, output: Tensor, input: Tensor, timeout_s: float) -> None:
        own = self.blocks(output)[self._rank]
        if own.data_ptr() != input.data_ptr():
            own.copy_(input.view(-1))
        self._run(self._program("all_gather", input.numel(), input.dtype), [output], SUM, timeout_s)

    def reduce_scatter(self, output: Tensor, input: Tensor, op: ReduceOp, timeout_s: float) -> None:
        copy = self.scratch.copy_of("input", input)  # the caller's stays as it is
        self._run(self._program("reduce_scatter", output.numel(), output.dtype), [copy], op, timeout_s)
        output.view(-1).copy_(self.blocks(copy)[self._rank])

    def gather(self, output: Tensor | None, input: Tensor, dst: int, timeout_s: float) -> None:
        if output is not None:
            self.blocks(output)[self._rank].copy_(input.view(-1))
        region = input if output is None else output
        self._run(self._program("gather", input.numel(), input.dtype, dst), [region], SUM, timeout_s)

    def scatter(self, output: Tensor, input: Tensor | None, src: int, timeout_s: float) -> None:
        region = output if input is None else input
        self._run(self._program("scatter", output.numel(), output.dtype, src), [region], SUM, timeout_s)
        if input is not None:
            output.view(-1).copy_(self.blocks(input)[self._rank])

    def all_to_all(self, output: Tensor, input: Tensor, timeout_s: float) -> None:
        sent = self.blocks(input)
        self.blocks(output)[self._rank].copy_(sent[self._rank])
        numel = sent[0].numel()
        num_extra = self.plan("all_to_all").num_chunks - 2 * self._world_size
        extra = self.scratch.take("extra", num_extra * numel, input.dtype, input.device)
        self._run(self._program("all_to_all", numel, input.dtype), [input, output, extra], SUM, timeout_s)

    def barrier(self, timeout_s: float) -> None:
        tokens = self.scratch.take("barrier", 2, torch.uint8, self._transport.comm.device_type)
        self._run(self._program("barrier", 1, torch.uint8), [tokens], SUM, timeout_s)

    def blocks(self, tensor: Tensor) -> Sequence[Tensor]:
        """Cut into one equal part per rank."""
        return torch.tensor_split(tensor.view(-1), self._world_size)

    # Steps ------------------------------------------------------------------------------------

    def _run(self, program: Program, regions: Sequence[Tensor], op: ReduceOp, timeout_s: float) -> None:
        """Run this rank's steps on contiguous memory."""
        if program.whole is not None:
            return self._run_whole(program, program.whole, regions, op, timeout_s)
        run = program.run
        dtype = regions[0].dtype
        deadline = Deadline(self._transport.agree(run.name, program.numel, dtype, op, run.root, timeout_s))
        flat = [region.view(-1) for region in regions]
        places = [flat[region].narrow(0, start, numel) for region, start, numel in program.ranges]
        early: list[Arrival] | None = None
        for step in program.steps:
            left = deadline.left_s
            arrivals = self._post_receives(step, places, left) if early is None else early
            sent = self._post_sends(step, places, left)
            if step.sends_first:
                for work in sent:
                    work.wait()
            early = None if step.following is None else self._post_receives(step.following, places, left)
            if step.in_order:
                store_in_order(arrivals, places, self._rank, op)
            else:
                for arrival in arrivals:
                    store(arrival, places, self._rank, op)
            for work in sent:
                work.wait()

    def _post_receives(self, step: ProgramStep, places: Sequence[Tensor], timeout_s: float) -> list[Arrival]:
        """Start what comes: a message goes where it belongs, or into scratch if it is reduced or was packed."""
        scratch = self.scratch.pieces(step.scratch, step.staged, places[0])
        arrivals = []
        for message in step.receives:
            memory = places[message.runs[0]] if message.in_place else next(scratch)
            work = self._transport.irecv(memory, message.peer, self.tag, timeout_s)
            arrivals.append(Arrival(work, message, memory))
        return arrivals

    def _post_sends(self, step: ProgramStep, places: Sequence[Tensor], timeout_s: float) -> list[Work]:
        """Start what goes: a run from where it is, several of them packed."""
        works = []
        for message in step.sends:
            runs = [places[run] for run in message.runs]
            memory = runs[0] if len(runs) == 1 else torch.cat(runs)
            self._transport.comm.traffic.count(memory.nbytes)
            works.append(self._transport.isend(memory, message.peer, self.tag, timeout_s))
        return works

    def _run_whole(
        self, program: Program, whole: Whole, regions: Sequence[Tensor], op: ReduceOp, timeout_s: float
    ) -> None:
        """Let the transport do all steps at once; what it sends counts as if it had sent it message by message."""
        self._transport.comm.traffic.count(program.numel_sent * regions[0].element_size(), program.num_sent)
        whole(regions, op, timeout_s)
