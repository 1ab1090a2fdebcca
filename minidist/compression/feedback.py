"""Error feedback: what a compression left out is not lost but sent with the next gradients.

Seide et al., "1-Bit Stochastic Gradient Descent and its Application to Data-Parallel Distributed Training of Speech
DNNs" (2014); why it converges: Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression
Schemes" (2019).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from minidist.communicator import Communicator, Work
from minidist.compression.compressor import Compressor, State, kept_on
from minidist.gradients.buckets import Bucket


class ErrorFeedback(Compressor):
    """Another compressor, to whose gradients is added what it did not send before.

    A backward pass that raises sends what it had of its gradients, and its error stays with the others. What is sent
    late for a parameter without a gradient in this pass, on any rank, is lost with it.

    Args:
        compressor: what sends the gradients.
        decay: what an error is multiplied by when the next gradients are added to it, 0 to 1.

    Raises:
        TypeError: it is no `Compressor`.
        ValueError: ``decay`` is out of range; or the compressor scales up what it sends to be unbiased, and feeding
            back its error would diverge.
    """

    def __init__(self, compressor: Compressor, decay: float = 1.0) -> None:
        super().__init__()
        if not 0 <= decay <= 1:
            raise ValueError(f"ErrorFeedback: decay must be at least 0 and at most 1, got {decay}")
        if not isinstance(compressor, Compressor):
            raise TypeError(
                "ErrorFeedback: compressor must be a Compressor, which tells what it has sent, got "
                f"{type(compressor).__name__}"
            )
        if isinstance(compressor, ErrorFeedback):
            raise ValueError("ErrorFeedback: the compressor feeds its errors back already; use one of them")
        if getattr(compressor, "unbiased", False):
            raise ValueError(
                f"ErrorFeedback: {type(compressor).__name__} scales up what it sends, and its error would grow; "
                "use unbiased=False (ddp.hook.compressor.unbiased=false)"
            )
        self.compressor = compressor
        self.decay = float(decay)
        compressor.is_asked = True

    def start(self, bucket: Bucket, values: Tensor, state: State, comm: Communicator) -> Work:
        error = kept_on(state, "error", values.device)
        if error is None:
            state["error"] = error = values.clone()
        else:
            values.add_(error, alpha=self.decay)
            error.copy_(values)

        def keep_the_rest() -> None:
            sent = self.compressor.sent(bucket, values, self.compressor.state_of(bucket), comm)
            # A gradient that overflowed has to spoil its own step, and not all that come after it.
            error.sub_(sent).nan_to_num_(0.0, 0.0, 0.0)

        return self.compressor(bucket, comm).then(keep_the_rest)

    def sent(self, bucket: Bucket, values: Tensor, state: State, comm: Communicator) -> Tensor:
        return self.compressor.sent(bucket, values, self.compressor.state_of(bucket), comm)

    def state_dict(self) -> dict[str, Any]:
        return {"errors": super().state_dict(), "compressor": self.compressor.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict["errors"])
        self.compressor.load_state_dict(state_dict["compressor"])

    def __deepcopy__(self, memo: dict[int, Any]) -> Compressor:
        other = super().__deepcopy__(memo)
        assert isinstance(other, ErrorFeedback)
        other.compressor = self.compressor.__deepcopy__(memo)
        return other
