"""Runs schedules on tensors, over nothing but a send and a receive.

The executor takes a schedule step by step. It posts the receives and the sends of a step together, each message cut
into *segments*, and combines a segment that has arrived while the next ones are still on their way::

    step      | irecv s0 s1 s2 | isend s0 s1 s2 | wait s0, add s0 | wait s1, add s1 | ...

Chunks that lie side by side are one piece of memory; others that travel together are packed where they are small, and
go one by one where they are not. What is not received in place waits in scratch memory that is kept between calls,
because fresh pages cost more than the copy into them. Where it is safe, the receives of the next step are posted before
this one has ended. Chunks without elements (fewer elements than chunks) are skipped on both sides.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from backends.deadline import Deadline
from backends.executor.messages import Arrival, messages, store, store_in_order
from backends.executor.plan import Plan, PlannedStep, ensure_right, planned
from backends.executor.scratch import Scratch
from minidist.collective import Run
from minidist.communicator import ReduceOp, Work
from minidist.contract.inner import Inner
from minidist.schedule import Recv, Reduce, Schedule

SUM = ReduceOp.SUM


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
        self.scratch = Scratch()
        self._turn = 0
        self.plan = functools.cache(self._make_plan)

    def _make_plan(self, collective: str, root: int = 0) -> Plan:
        """Work out this rank's steps; every rank does so when it first comes here, before anything is sent."""
        schedule = self.schedules[collective]
        run = Run(collective, self._world_size, root)
        if self._proves:
            ensure_right(schedule, run, self._rank)
        return planned(schedule, run, self._rank)

    # Collectives ------------------------------------------------------------------------------

    def all_reduce(self, tensor: Tensor, op: ReduceOp, timeout_s: float) -> None:
        self._run_cut(self.plan("all_reduce"), tensor, op, timeout_s)

    def reduce(self, tensor: Tensor, dst: int, op: ReduceOp, timeout_s: float) -> None:
        self._run_cut(self.plan("reduce", dst), tensor, op, timeout_s)

    def broadcast(self, tensor: Tensor, src: int, timeout_s: float) -> None:
        self._run_cut(self.plan("broadcast", src), tensor, SUM, timeout_s)

    def _run_cut(self, plan: Plan, tensor: Tensor, op: ReduceOp, timeout_s: float) -> None:
        """Run it on equal parts of the tensor, the first ones larger by one element where it does not divide."""
        self._run(plan, torch.tensor_split(tensor.view(-1), plan.num_chunks), op, timeout_s)

    def all_gather(self, output: Tensor, input: Tensor, timeout_s: float) -> None:
        blocks = self.blocks(output)
        if blocks[self._rank].data_ptr() != input.data_ptr():
            blocks[self._rank].copy_(input.view(-1))
        self._run(self.plan("all_gather"), blocks, SUM, timeout_s)

    def reduce_scatter(self, output: Tensor, input: Tensor, op: ReduceOp, timeout_s: float) -> None:
        blocks = self.blocks(self.scratch.copy_of("input", input))  # the caller's stays as it is
        self._run(self.plan("reduce_scatter"), blocks, op, timeout_s)
        output.view(-1).copy_(blocks[self._rank])

    def gather(self, output: Tensor | None, input: Tensor, dst: int, timeout_s: float) -> None:
        blocks = self._root_blocks(output, input)
        if output is not None:
            blocks[self._rank].copy_(input.view(-1))
        self._run(self.plan("gather", dst), blocks, SUM, timeout_s)

    def scatter(self, output: Tensor, input: Tensor | None, src: int, timeout_s: float) -> None:
        blocks = self._root_blocks(input, output)
        self._run(self.plan("scatter", src), blocks, SUM, timeout_s)
        if input is not None:
            output.view(-1).copy_(blocks[self._rank])

    def all_to_all(self, output: Tensor, input: Tensor, timeout_s: float) -> None:
        plan = self.plan("all_to_all")
        sent = self.blocks(input)
        received = self.blocks(output)
        received[self._rank].copy_(sent[self._rank])
        num_extra = plan.num_chunks - 2 * self._world_size
        extra = self.scratch.pieces("extra", [sent[0].numel()] * num_extra, input)
        self._run(plan, [*sent, *received, *extra], SUM, timeout_s)

    def barrier(self, timeout_s: float) -> None:
        tokens = self.scratch.take("barrier", 2, torch.uint8, self._transport.comm.device_type)
        self._run(self.plan("barrier"), [tokens[:1], tokens[1:]], SUM, timeout_s)

    def blocks(self, tensor: Tensor) -> Sequence[Tensor]:
        """Cut into one part per rank, the first ones larger by one element where it does not divide."""
        return torch.tensor_split(tensor.view(-1), self._world_size)

    def _root_blocks(self, many: Tensor | None, one: Tensor) -> Sequence[Tensor]:
        """Return the blocks at the root; elsewhere only the own one is there, and a right schedule names no other."""
        return [one.view(-1)] * self._world_size if many is None else self.blocks(many)

    # Steps ------------------------------------------------------------------------------------

    def _run(self, plan: Plan, chunks: Sequence[Tensor], op: ReduceOp, timeout_s: float) -> None:
        """Run this rank's steps on the memory in ``chunks``; each chunk is 1-d and contiguous."""
        run = plan.run
        deadline = Deadline(self._transport.agree(run.name, chunks, op, run.root, timeout_s))
        early: list[Arrival] | None = None
        for number, step in enumerate(plan.steps, start=1):
            left = deadline.left_s
            arrivals = self._post_receives(step, chunks, left) if early is None else early
            sent = self._post_sends(step, chunks, left)
            early = None
            following = plan.steps[number] if number < len(plan.steps) else None
            # Not where a message travels in segments: to wait for the sends here would leave no transfer to hide the
            # reductions behind.
            is_early = following is not None and following.early and len(sent) <= len(step.sends)
            if is_early or step.sends_first:
                for work in sent:
                    work.wait()
            if following is not None and is_early:
                early = self._post_receives(following, chunks, left)
            if step.in_order:
                store_in_order(arrivals, self._rank, op)
            else:
                for arrival in arrivals:
                    store(arrival, self._rank, op)
            for work in sent:
                work.wait()

    def _post_receives(self, step: PlannedStep, chunks: Sequence[Tensor], timeout_s: float) -> list[Arrival]:
        """Start what comes: a message goes where it belongs, or into scratch if it is reduced or was packed."""
        coming = [(move, runs) for move in step.arrivals for runs in messages(chunks, move, self._segment_bytes)]
        staged = [
            sum(run.numel() for run in runs) for move, runs in coming if isinstance(move, Reduce) or len(runs) > 1
        ]
        self._turn = 1 - self._turn  # what arrives early must not overwrite what is being reduced
        scratch = self.scratch.pieces(f"arriving{self._turn}", staged, chunks[0])
        arrivals = []
        for move, runs in coming:
            in_place = isinstance(move, Recv) and len(runs) == 1
            message = runs[0] if in_place else next(scratch)
            work = self._transport.irecv(message, move.peer, self.tag, timeout_s)
            arrivals.append(Arrival(work, move, message, () if in_place else runs))
        return arrivals

    def _post_sends(self, step: PlannedStep, chunks: Sequence[Tensor], timeout_s: float) -> list[Work]:
        """Start what goes: a run from where it is, several of them packed."""
        works = []
        for move in step.sends:
            for runs in messages(chunks, move, self._segment_bytes):
                message = runs[0] if len(runs) == 1 else torch.cat(runs)
                self._transport.comm.traffic.count(message.nbytes)
                works.append(self._transport.isend(message, move.peer, self.tag, timeout_s))
        return works
