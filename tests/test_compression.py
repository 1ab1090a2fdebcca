"""Gradients in fewer bytes: what every compressor promises, and what each says of itself."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from backends.thread import run_threads
from minidist.communicator import Communicator
from minidist.compression import (
    Compressor,
    ErrorFeedback,
    Float8,
    Format,
    Int8,
    PowerSGD,
    Quantized,
    RandomK,
    Sign,
    TopK,
)
from minidist.ddp import DistributedDataParallel
from tests import harness, models, training_checks

COMPRESSORS: dict[str, Callable[[], Compressor]] = {
    "top_k": lambda: TopK(0.3),
    "random_k": lambda: RandomK(0.5, unbiased=False),
    "int8": lambda: Quantized(Int8(8)),
    "float8": lambda: Quantized(Float8(16)),
    "sign": lambda: Quantized(Sign(8)),
    "power_sgd": lambda: PowerSGD(1, min_compression_rate=0),
}
LOSSLESS: dict[str, Callable[[], Compressor]] = {
    "top_k": lambda: TopK(1.0),
    "random_k": lambda: RandomK(1.0),
    "power_sgd": lambda: PowerSGD(100, min_compression_rate=0),
    "power_sgd that gains nothing": lambda: PowerSGD(100),
}
SMALL_BUCKETS = {"bucket_cap_mb": 1e-4}
each_compressor = pytest.mark.parametrize("name", COMPRESSORS)


def gradients(ddp: DistributedDataParallel) -> list[Tensor]:
    return [parameter.grad.detach().clone() for parameter in ddp.parameters()]


def flat_gradient(hook: Compressor, values: Tensor, comm: Communicator, passes: int = 1) -> Tensor:
    """Return the gradient of a model with one weight of the shape of ``values`` which is theirs on every rank."""
    weight = nn.Parameter(torch.zeros_like(values))
    module = nn.Module()
    module.weight = weight
    module.forward = lambda: (module.weight * values).sum()  # type: ignore[assignment]
    ddp = DistributedDataParallel(module, comm, hook=hook)
    total = torch.zeros_like(values)
    for _ in range(passes):
        ddp.zero_grad()
        ddp().backward()
        total += module.weight.grad
    return total / passes


@pytest.mark.parametrize("world_size", [1, 2, 3])
@each_compressor
def test_what_was_sent_and_what_is_held_back_are_the_gradients(name: str, world_size: int) -> None:
    """And all ranks have the same."""

    def job(comm: Communicator) -> None:
        hook = ErrorFeedback(COMPRESSORS[name]())
        ddp = DistributedDataParallel(models.seeded(models.mlp().double()), comm, hook=hook, **SMALL_BUCKETS)
        wanted = [torch.zeros_like(parameter) for parameter in ddp.parameters()]
        given = copy.deepcopy(wanted)
        for step in range(6):
            ddp.zero_grad()
            training_checks.backward(ddp, step)
            training_checks.assert_replicas_identical(ddp, gradients(ddp))
            for total, gradient in zip(given, gradients(ddp), strict=True):
                total += gradient
            for total, gradient in zip(
                wanted, training_checks.mean_gradients(ddp.module, [step], comm.world_size), strict=True
            ):
                total += gradient
        assert not all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(given, wanted, strict=True)), "nothing was lost"
        for bucket in ddp.buckets:
            held_back = hook.states[bucket.index]["error"].clone()
            comm.all_reduce(held_back)
            bucket.flat.copy_(held_back)
            for parameter, place in zip(bucket.parameters, bucket.views, strict=True):
                given[[p is parameter for p in ddp.parameters()].index(True)] += place
        for total, gradient in zip(given, wanted, strict=True):
            torch.testing.assert_close(total, gradient, rtol=0, atol=2e-5)  # formats have their scales in float32

    run_threads(job, world_size)


@pytest.mark.parametrize("name", LOSSLESS)
def test_what_leaves_nothing_out_is_the_plain_all_reduce(name: str) -> None:
    def job(comm: Communicator) -> None:
        ddp = training_checks.wrapped(training_checks.CASES["mlp"], comm, hook=LOSSLESS[name]())
        for step in range(3):
            ddp.zero_grad()
            training_checks.backward(ddp, step)
            expected = training_checks.mean_gradients(ddp.module, [step], comm.world_size)
            for gradient, wanted in zip(gradients(ddp), expected, strict=True):
                torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-12)

    run_threads(job, 3)


@pytest.mark.parametrize("world_size", [2, 3])
def test_bytes_are_those_of_the_formula(world_size: int) -> None:
    """Those that crossed the communicator, over all ranks."""
    rows, columns = 40, 30
    numel = rows * columns
    share = -(-numel // (world_size * 16)) * 16
    gathered = world_size * (world_size - 1)
    reduced = 2 * (world_size - 1)
    expected = {
        TopK(0.1): gathered * (numel // 10) * (4 + 4),
        RandomK(0.1): reduced * (numel // 10) * 4,
        Quantized(Int8(16)): 2 * gathered * (share + share // 16 * 4),
        Quantized(Float8(16)): 2 * gathered * (share + share // 16 * 4),
        Quantized(Sign(16)): 2 * gathered * (share // 8 + share // 16 * 4),
        PowerSGD(2): reduced * (rows + columns) * 2 * 4,
        PowerSGD(20): reduced * numel * 4,  # it gains nothing
    }

    def sent(hook: Compressor, comm: Communicator) -> int:
        mine = copy.deepcopy(hook)
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
        before = comm.traffic.bytes
        flat_gradient(mine, weight, comm)
        first = comm.traffic.bytes - before
        before = comm.traffic.bytes
        flat_gradient(copy.deepcopy(hook), weight, comm, passes=3)
        return (comm.traffic.bytes - before - first) // 2  # without what a wrapper sends at first

    for hook, formula in expected.items():
        assert sum(run_threads(lambda comm, hook=hook: sent(hook, comm), world_size)) == formula, hook


@pytest.mark.parametrize("make", [lambda seed: RandomK(0.25, seed=seed), lambda seed: Quantized(Int8(8), seed=seed)])
def test_the_mean_over_seeds_is_right(make: Callable[[int], Compressor]) -> None:
    values = torch.linspace(-1, 1.5, 64, dtype=torch.float64).exp()

    def mean(comm: Communicator) -> Tensor:
        passes, seeds = 40, 10
        return sum(flat_gradient(make(seed), values, comm, passes) for seed in range(seeds)) / seeds

    # 400 draws: the mean of RandomK errs by sqrt(3 / 400) = 9 % of the value (1 sigma), that of Int8 by less.
    torch.testing.assert_close(run_threads(mean, 2)[0], values, rtol=0.4, atol=0)
    assert abs(run_threads(mean, 2)[0].sum() / values.sum() - 1) < 0.06


@pytest.mark.parametrize("format", [Float8(8), Int8(8), Sign(8)], ids=lambda format: type(format).__name__)
def test_formats(format: Format) -> None:
    draws = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 64, generator=draws)
    rows[1, 8:16] = 0
    data = format.encode(rows, draws)
    assert (data.dtype, data.shape) == (torch.uint8, (3, format.nbytes(64)))
    back = format.decode(data, 64)
    assert torch.equal(back[1, 8:16], torch.zeros(8))
    largest = rows.view(3, 8, 8).abs().amax(-1, keepdim=True).expand(3, 8, 8).reshape(3, 64)
    error = (back - rows).abs() / largest.where(largest != 0, 1)
    assert error.max() <= {"Float8": 1 / 16, "Int8": 1 / 127 + 1e-6, "Sign": 1.0}[type(format).__name__]
    assert (back.sign() == rows.sign()).float().mean() > 0.95
    for bad in (torch.inf, torch.nan):
        spoiled = rows.clone()
        spoiled[2, 20] = bad
        result = format.decode(format.encode(spoiled, draws), 64)
        assert not result[2, 16:24].isfinite().all(), "an overflow has to be seen"
        assert result[:2].isfinite().all()


@each_compressor
def test_an_overflow_spoils_one_step_only(name: str) -> None:
    def job(comm: Communicator) -> None:
        hook = ErrorFeedback(COMPRESSORS[name]())
        ddp = DistributedDataParallel(models.seeded(models.mlp()), comm, hook=hook)
        seen = []
        for step in range(4):
            ddp.zero_grad()
            scale = torch.inf if step == 1 and comm.rank == 0 else 1.0
            (ddp(torch.ones(2, 5)).sum() * scale).backward()
            seen.append(all(gradient.isfinite().all() for gradient in gradients(ddp)))
        assert seen == [True, False, True, True]

    run_threads(job, 2)


def test_an_overflow_is_seen_wherever_it_is() -> None:
    """Also where nobody looks at the gradients that are left out."""

    def job(comm: Communicator) -> None:
        values = torch.ones(200)
        values[7] = torch.inf
        for name in ("top_k", "int8", "float8", "sign", "power_sgd", "random_k"):
            mean = flat_gradient(ErrorFeedback(COMPRESSORS[name]()), values.view(20, 10), comm)
            assert not mean.isfinite().all(), name
        assert not flat_gradient(RandomK(0.01), values, comm).isfinite().all()

    run_threads(job, 2)


def test_power_sgd_goes_on_after_a_pass_without_a_gradient() -> None:
    """Of a matrix whose first rows and columns are always 0, as those of dead units and black pixels."""

    def job(comm: Communicator) -> None:
        values = torch.zeros(12, 10)
        values[4:, 4:] = 1.0
        hook = PowerSGD(2, min_compression_rate=0)
        ddp = DistributedDataParallel(nn.Linear(10, 12, bias=False), comm, hook=hook)
        for scale in (0.0, torch.inf, 1.0, 1.0):
            ddp.zero_grad()
            (ddp(torch.eye(10)).T * values * scale).sum().backward()
        torch.testing.assert_close(ddp.module.weight.grad, values)

    run_threads(job, 2)


def test_what_fills_up_a_share_counts_for_nothing() -> None:
    def job(comm: Communicator) -> None:
        values = torch.ones(100)
        torch.testing.assert_close(flat_gradient(Quantized(Sign(64)), values, comm), values)

    for world_size in (1, 2, 3):
        run_threads(job, world_size)


@each_compressor
def test_copies_of_one_hook_do_not_share_what_they_sent(name: str) -> None:
    """Each rank, a thread, has a copy of its own."""
    prototype = ErrorFeedback(COMPRESSORS[name]())
    values = torch.arange(1.0, 25.0).view(6, 4)

    def job(comm: Communicator) -> Tensor:
        return flat_gradient(copy.deepcopy(prototype), values * (comm.rank + 1), comm, passes=3)

    copied = run_threads(job, 3)
    own = run_threads(
        lambda comm: flat_gradient(ErrorFeedback(COMPRESSORS[name]()), values * (comm.rank + 1), comm, passes=3), 3
    )
    assert all(map(torch.equal, copied, own))


@each_compressor
def test_an_empty_bucket(name: str) -> None:
    def job(comm: Communicator) -> None:
        module = nn.Linear(3, 2)
        module.empty = nn.Parameter(torch.empty(0, dtype=torch.float64))
        ddp = DistributedDataParallel(module, comm, hook=ErrorFeedback(COMPRESSORS[name]()))
        (ddp(torch.ones(1, 3)).sum() + module.empty.sum()).backward()
        assert module.weight.grad.shape == (2, 3)

    run_threads(job, 2)


def test_a_state_of_other_settings_is_told_apart() -> None:
    hooks = [
        TopK(0.1),
        TopK(0.2),
        PowerSGD(1),
        PowerSGD(3),
        Quantized(Int8(8)),
        Quantized(Int8(16)),
        Quantized(Sign(8)),
    ]
    hooks += [ErrorFeedback(TopK(0.1)), ErrorFeedback(PowerSGD(1))]
    assert len({hook.describe() for hook in hooks}) == len(hooks)
    assert TopK(0.1).describe() == TopK(0.1).describe()


def test_a_state_of_other_buckets_is_named() -> None:
    def job(comm: Communicator) -> None:
        hook = ErrorFeedback(TopK(0.5))
        first = DistributedDataParallel(models.seeded(models.mlp()), comm, hook=hook)
        first(torch.ones(1, 5)).sum().backward()
        other = ErrorFeedback(TopK(0.5))
        other.load_state_dict(hook.state_dict())
        ddp = DistributedDataParallel(models.seeded(models.mlp()), comm, hook=other, **SMALL_BUCKETS)
        with pytest.raises(RuntimeError, match=r"state is of a bucket .*, and this one has .* bucket_cap_mb"):
            ddp(torch.ones(1, 5)).sum().backward()

    run_threads(job, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64], ids=str)
@each_compressor
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    def job(comm: Communicator) -> None:
        hook = ErrorFeedback(COMPRESSORS[name]())
        layer = nn.Linear(7, 5, dtype=dtype)
        ddp = DistributedDataParallel(layer, comm, hook=hook)
        for _ in range(2):
            ddp.zero_grad()
            ddp(torch.ones(2, 7, dtype=dtype)).abs().sum().backward()
            assert gradients(ddp)[0].abs().sum() > 0
            training_checks.assert_replicas_identical(ddp, gradients(ddp))

    run_threads(job, 2)


@each_compressor
def test_a_state_goes_on_to_the_same_bits(name: str) -> None:
    def trained(comm: Communicator, hook: Compressor, steps: range) -> list[Tensor]:
        ddp = DistributedDataParallel(models.seeded(models.mlp().double()), comm, hook=hook, **SMALL_BUCKETS)
        for step in steps:
            ddp.zero_grad()
            training_checks.backward(ddp, step)
        return gradients(ddp)

    def job(comm: Communicator) -> None:
        make = COMPRESSORS[name]
        whole = trained(comm, ErrorFeedback(make()), range(5))
        first = ErrorFeedback(make())
        trained(comm, first, range(3))
        saved = copy.deepcopy(first.state_dict())
        resumed = ErrorFeedback(make())
        resumed.load_state_dict(saved)
        assert all(map(torch.equal, trained(comm, resumed, range(3, 5)), whole))
        copied = copy.deepcopy(resumed)
        resumed.load_state_dict(saved)  # what it was loaded from is as it was
        assert all(map(torch.equal, trained(comm, copy.deepcopy(resumed), range(3, 5)), whole))
        assert not all(map(torch.equal, trained(comm, copied, range(3, 5)), whole))
        lost = ErrorFeedback(make())
        assert not all(map(torch.equal, trained(comm, lost, range(3, 5)), whole)), "it would go unnoticed"

    run_threads(job, 2)


def test_a_hook_serves_one_model() -> None:
    def job(comm: Communicator) -> None:
        hook = ErrorFeedback(TopK(0.5))
        first = DistributedDataParallel(models.seeded(models.mlp()), comm, hook=hook)
        other = DistributedDataParallel(models.seeded(models.mlp()), comm, hook=hook)
        copied = copy.deepcopy(first)
        for ddp in (first, copied):
            ddp(torch.ones(1, 5)).sum().backward()
        with pytest.raises(RuntimeError, match="has served another model and has its state; give each wrapped model"):
            other(torch.ones(1, 5)).sum().backward()

    run_threads(job, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(0), r"TopK: fraction must be above 0 and at most 1, got 0"),
        (lambda: RandomK(1.5), r"RandomK: fraction must be above 0 and at most 1, got 1.5"),
        (lambda: PowerSGD(0), r"PowerSGD: rank must be a whole number of at least 1, got 0"),
        (lambda: PowerSGD(1.5), r"PowerSGD: rank must be a whole number of at least 1, got 1.5"),
        (lambda: PowerSGD(1, math.nan), r"min_compression_rate must be at least 0, got nan"),
        (lambda: PowerSGD(1, -1), r"min_compression_rate must be at least 0, got -1"),
        (lambda: Int8(12), r"Int8: block must be a positive multiple of 8, got 12"),
        (lambda: ErrorFeedback(RandomK(0.1)), r"RandomK scales up what it sends, .* use unbiased=False"),
        (lambda: ErrorFeedback(ErrorFeedback(TopK(0.1))), r"feeds its errors back already"),
    ],
)
def test_bad_settings(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_parts() -> None:
    with pytest.raises(TypeError, match=r"compressor must be a Compressor, which tells what it has sent, got int"):
        ErrorFeedback(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"format must be a Format, got str"):
        Quantized("int8")  # type: ignore[arg-type]


def test_power_sgd_is_that_of_torch(tmp_path: Path) -> None:
    returncode, output = harness.run_forked(
        "tests.against_torch_power_sgd",
        str(tmp_path / "rendezvous"),
        world_size=2,
        output=tmp_path / "output.txt",
        limit_s=100,
    )
    assert returncode == 0, output
