"""Which gradients travel together, and where they lie in their bucket."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from minidist.gradients.buckets import Bucket, assign, make_buckets


@pytest.mark.parametrize(
    ("sizes", "kinds", "expected"),
    [
        ([], "", []),
        ([1], "a", [[0]]),
        ([1, 1, 1, 1, 1], "aaaaa", [[0, 1], [2, 3, 4]]),  # the first closes at 2, others at 4
        ([1, 1, 2, 2, 2], "aaaaa", [[0, 1], [2, 3], [4]]),
        ([9, 9, 1], "aaa", [[0], [1], [2]]),
        ([0, 0, 0], "aaa", [[0, 1, 2]]),
        ([1, 1, 1, 1], "abab", [[0, 2], [1, 3]]),
        ([1, 2, 2, 1, 1], "abbbb", [[0], [1], [2, 3, 4]]),
    ],
)
def test_assign(sizes: list[int], kinds: str, expected: list[list[int]]) -> None:
    assert assign(sizes, kinds, cap_bytes=4, first_cap_bytes=2) == expected


def test_assign_takes_everything_once() -> None:
    sizes = [(7 * i) % 11 for i in range(100)]
    kinds = [i % 3 for i in range(100)]
    groups = assign(sizes, kinds, cap_bytes=30, first_cap_bytes=10)
    assert sorted(i for group in groups for i in group) == list(range(100))
    assert all(len({kinds[i] for i in group}) == 1 and group == sorted(group) for group in groups)
    assert all(sum(sizes[i] for i in group[:-1]) < 30 for group in groups)


def empty(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full((numel,), -1, dtype=dtype, device=device)


def bucket_of(*parameters: nn.Parameter) -> Bucket:
    module = nn.ParameterList(parameters)
    (bucket,) = make_buckets(module, 2**30, empty)
    return bucket


def test_last_layer_comes_first() -> None:
    model = nn.Sequential(*(nn.Linear(600, 600) for _ in range(3)))  # 1.4 MB each: the first bucket is full with one
    buckets = make_buckets(model, 2**30, empty)
    assert [bucket.names for bucket in buckets] == [
        ["2.bias", "2.weight"],
        ["1.bias", "1.weight", "0.bias", "0.weight"],
    ]
    assert [bucket.index for bucket in buckets] == [0, 1]


def test_frozen_parameters_get_no_place() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    (bucket,) = make_buckets(model, 2**20, empty)
    assert bucket.names == ["weight"]


def test_views_cover_the_bucket_in_the_layout_of_their_parameters() -> None:
    image = nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
    transposed = nn.Parameter(torch.randn(4, 6).t())
    sliced = nn.Parameter(torch.randn(4, 6)[:, ::2])
    scalar, nothing = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.empty(0, 3))
    parameters = [image, transposed, sliced, scalar, nothing]
    bucket = bucket_of(*parameters)
    views = dict(zip(bucket.names, bucket.views, strict=True))
    for index, parameter in enumerate(parameters):
        assert views[str(index)].shape == parameter.shape
        views[str(index)].fill_(index)
    assert views["0"].stride() == image.stride()
    assert views["1"].stride() == transposed.stride()
    assert views["2"].is_contiguous()
    counts = [int((bucket.flat == index).sum()) for index in range(5)]
    assert counts == [parameter.numel() for parameter in parameters]


def test_put_divides_and_keeps_the_gradient_in_the_bucket() -> None:
    parameter = nn.Parameter(torch.ones(3))
    bucket = bucket_of(parameter)
    parameter.grad = torch.tensor([1.0, 2.0, 3.0])
    bucket.put(0, 3)
    assert parameter.grad is bucket.views[0]
    assert torch.equal(bucket.flat, torch.tensor([1.0, 2.0, 3.0]) / 3)
    assert not bucket.missing
    bucket.reset()
    parameter.grad.add_(1)
    bucket.put(0, 2)
    assert torch.equal(bucket.flat, (torch.tensor([1.0, 2.0, 3.0]) / 3 + 1) / 2)


def test_put_missing_zeroes_what_has_no_gradient() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    bucket = bucket_of(used, unused)
    used.grad = torch.full((2,), 4.0)
    bucket.put_missing(2)
    assert torch.equal(bucket.flat, torch.tensor([0.0, 0.0, 2.0, 2.0]))
    assert unused.grad is None
