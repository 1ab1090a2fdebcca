"""One communicator around another: the base of all that change, watch or replace a part of what another one does.

::

    class Patient(Wrapper):
        def _collective(self, name):
            run = super()._collective(name)

            def waited(*args):
                time.sleep(0.1)
                run(*args)

            return waited

    comm = Patient(GlooCommunicator())
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from minidist.communicator import Communicator, Device, ReduceOp, Shape, Work
from minidist.contract.inner import Inner
from minidist.errors import CommError


class Wrapper(Communicator):
    """Another communicator, which does everything that a subclass does not do itself.

    It takes the other one over, and closing it closes that one. Several can be made around one, each on a channel of
    its own; they share its traffic and the order of its operations.

    To act around collectives, or in their place, override `_collective`; to see what the user gave them, on which
    thread, `_run`, which asks for that hook, and `_dispatch`, which runs it in its turn; around messages, `_isend` and
    `_irecv`, whose ``src`` may be ANY_SOURCE; and `_split`, which here makes one of the other's own kind.

    Args:
        inner: the communicator that it is made around.
        timeout_s: None for that one's.
    """

    def __init__(self, inner: Communicator, timeout_s: float | None = None) -> None:
        super().__init__(inner.rank, inner.world_size, inner.timeout_s if timeout_s is None else timeout_s)
        self.device_type = inner.device_type  # type: ignore[misc]  # the class's is only the default
        self._inner = Inner(inner)
        self._inner.adopt(self)

    def empty(self, shape: Shape, dtype: torch.dtype = torch.float32, device: Device = None) -> Tensor:
        return self._inner.comm.empty(shape, dtype, device)

    def _collective(self, name: str) -> Callable[..., None]:
        return self._inner.collective(name)

    def _isend(self, tensor: Tensor, dst: int, tag: int, timeout_s: float) -> Work:
        return self._inner.isend(tensor, dst, tag, timeout_s)

    def _irecv(self, tensor: Tensor, src: int, tag: int, timeout_s: float) -> Work:
        return self._inner.irecv(tensor, src, tag, timeout_s)

    def _agree(
        self, collective: str, numel: int, dtype: torch.dtype, op: ReduceOp, root: int, timeout_s: float
    ) -> float:
        return self._inner.agree(collective, numel, dtype, op, root, timeout_s)

    def _dispatch(self, run: Callable[[], None], async_op: bool) -> Work:
        return self._inner.dispatch(run, async_op)

    def _split(self, groups: list[list[int]]) -> Communicator | None:
        return self._inner.split(groups)

    def _close(self) -> None:
        self._inner.comm.close()

    def _abort(self, reason: str) -> None:
        self._inner.comm.abort(reason)

    def _gone(self) -> Mapping[int, str]:
        return self._inner.gone()

    def _translate(self, error: Exception) -> CommError:
        return self._inner.translate(error)
