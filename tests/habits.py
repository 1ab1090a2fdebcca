"""Programs as users write them, with whatever wraps their models: torch's DDP, or ours over some communicator.

Started by `test_habits` as ``-m tests.habits DIRECTORY torch:NAME,NAME`` under torchrun, which leaves what torch's DDP
makes of these programs, and with dotted paths of communicators in its place, which compares.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as TorchDDP
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.data import DataLoader, Dataset

from backends.thread import spawn_threads
from minidist.communicator import Communicator, ReduceOp
from minidist.ddp import DistributedDataParallel
from minidist.sync_batch_norm import convert_sync_batchnorm
from tests import models
from tests.table import made_by

WORLD_SIZE = 2
LIMIT_S = 60.0
Wrap = Callable[..., nn.Module]
Result = list[Tensor]


def data(step: int, rank: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def built(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    return models.seeded(build().double(), seed)


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)


def state(*wrapped: nn.Module) -> Result:
    return [parameter.detach().clone() for module in wrapped for parameter in module.parameters()]


def generator_and_discriminator(wrap: Wrap, rank: int) -> Result:
    """Real and fake batches before one backward, through batch normalisation; the discriminator frozen meanwhile."""
    generator, discriminator = wrap(built(models.mlp)), wrap(built(lambda: _discriminator(models.NUM_OUTPUTS), 1))
    optimizers = sgd(generator), sgd(discriminator)
    for step in range(4):
        real, noise = data(step, rank, 4, models.NUM_OUTPUTS), data(50 + step, rank, 4, models.NUM_INPUTS)
        fake = generator(noise)
        discriminator.requires_grad_(True)
        optimizers[1].zero_grad()
        (discriminator(fake.detach()).mean() - discriminator(real).mean()).backward()
        optimizers[1].step()
        discriminator.requires_grad_(False)
        optimizers[0].zero_grad()
        (-discriminator(fake).mean()).backward()
        optimizers[0].step()
    return state(generator, discriminator)


def _discriminator(num_inputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(num_inputs, 8), nn.BatchNorm1d(8), nn.LeakyReLU(), nn.Linear(8, 1))


def gradient_penalty(wrap: Wrap, rank: int) -> Result:
    model = wrap(built(models.mlp))
    optimizer = sgd(model)
    for step in range(3):
        inputs = data(step, rank, 4, models.NUM_INPUTS).requires_grad_()
        outputs = model(inputs)
        (slope,) = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)
        optimizer.zero_grad()
        (outputs.square().mean() + (slope.norm(dim=1) - 1).square().mean()).backward()
        optimizer.step()
    return state(model)


def averages_of_a_model(wrap: Wrap, rank: int) -> Result:
    """An EMA by deepcopy, one by AveragedModel, of the wrapper and of its module; batch statistics for the average."""
    model = wrap(built(models.batch_norm))
    by_copy = copy.deepcopy(model)
    averages = [AveragedModel(each, multi_avg_fn=get_ema_multi_avg_fn(0.9)) for each in (model, model.module)]
    optimizer = sgd(model)
    for step in range(3):
        _step(model, optimizer, step, rank)
        with torch.no_grad():
            for average, value in zip(by_copy.parameters(), model.parameters(), strict=True):
                average.lerp_(value, 0.1)
        averages[0].update_parameters(model)
        averages[1].update_parameters(model.module)
    update_bn([data(step, 0, 4, models.NUM_INPUTS) for step in range(2)], averages[1])
    buffers = [buffer.clone() for buffer in averages[1].buffers()]
    evaluated = averages[0].eval()(data(9, 0, 4, models.NUM_INPUTS)).detach()
    # Of the other ranks' statistics torch's wrapper takes those of rank 0 in evaluation too, ours only in training.
    return [*state(model, by_copy, *averages), *buffers, *([evaluated] if rank == 0 else [])]


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, rank: int) -> Tensor:
    optimizer.zero_grad()
    loss = model(data(step, rank, 4, models.NUM_INPUTS)).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


def accumulation_and_clipping(wrap: Wrap, rank: int) -> Result:
    model = wrap(built(models.mlp))
    optimizer = sgd(model)
    norms = []
    for step in range(3):
        optimizer.zero_grad()
        with model.no_sync():
            model(data(step, rank, 4, models.NUM_INPUTS)).square().mean().backward()
        model(data(10 + step, rank, 4, models.NUM_INPUTS)).square().mean().backward()
        norms.append(clip_grad_norm_(model.parameters(), 0.1).detach())
        optimizer.step()
    return [*state(model), *norms]


def two_forwards(wrap: Wrap, rank: int) -> Result:
    model = wrap(built(models.batch_norm))
    optimizer = sgd(model)
    for step in range(3):
        optimizer.zero_grad()
        first, second = (model(data(10 * i + step, rank, 4, models.NUM_INPUTS)) for i in range(2))
        (first - second).square().mean().backward()
        optimizer.step()
    return state(model)


class Complex(nn.Module):
    """A spectral layer, whose weight is complex, between real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(models.NUM_INPUTS, 8, dtype=torch.float64)
        self.spectrum = nn.Parameter(torch.ones(5, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(self.first(x)) * self.spectrum, n=8)


def complex_parameters(wrap: Wrap, rank: int) -> Result:
    module = Complex()
    models.seeded(module.first)
    model = wrap(module)
    optimizer = sgd(model)
    for step in range(3):
        _step(model, optimizer, step, rank)
    return state(model)


def loading_a_state(wrap: Wrap, rank: int) -> Result:
    """Go back to a state in the middle of training, as after a bad epoch."""
    model = wrap(built(models.batch_norm))
    optimizer = sgd(model)
    _step(model, optimizer, 0, rank)
    kept = copy.deepcopy((model.module.state_dict(), optimizer.state_dict()))
    for step in (1, 2):
        _step(model, optimizer, step, rank)
    model.module.load_state_dict(kept[0])
    optimizer.load_state_dict(kept[1])
    _step(model, optimizer, 3, rank)
    return state(model)


def thawing_by_wrapping_again(wrap: Wrap, rank: int) -> Result:
    """Fine-tune the head first, and then all."""
    module = built(models.mlp)
    module[0].requires_grad_(False)
    model = wrap(module)
    _step(model, sgd(module[2]), 0, rank)
    del model
    module[0].requires_grad_(True)
    model = wrap(module)
    _step(model, sgd(module), 1, rank)
    return state(model)


class Numbers(Dataset[Tensor]):
    """Loaded by processes that are forked in the middle of training."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Tensor:
        return self.values[index]


def loader_processes(wrap: Wrap, rank: int) -> Result:
    model = wrap(built(models.mlp))
    optimizer = sgd(model)
    loader = DataLoader(Numbers(data(0, rank, 12, models.NUM_INPUTS)), batch_size=4, num_workers=2)
    for _ in range(2):
        for inputs in loader:
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
    return state(model)


def _compiled(compiled: Callable[[Wrap, nn.Module], nn.Module]) -> Callable[[Wrap, int], Result]:
    def program(wrap: Wrap, rank: int) -> Result:
        model = compiled(wrap, built(models.batch_norm))
        optimizer = sgd(model)
        losses = [_step(model, optimizer, step, rank) for step in range(3)]
        return [*state(model), *losses]

    return program


def compiled_step(wrap: Wrap, rank: int) -> Result:
    """The whole step is compiled, backward in it."""
    model = wrap(built(models.batch_norm))
    optimizer = sgd(model)

    @torch.compile(backend="eager")
    def step(inputs: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    losses = [step(data(number, rank, 4, models.NUM_INPUTS)).detach() for number in range(3)]
    return [*state(model), *losses]


def compiled_accumulation(wrap: Wrap, rank: int) -> Result:
    """With a forward that communicates and one that does not, in few variants of compiled code."""
    model = wrap(built(models.mlp))

    @torch.compile(backend="eager")
    def step(inputs: Tensor) -> None:
        with model.no_sync():
            model(inputs).square().mean().backward()
        model(inputs.sin()).square().mean().backward()

    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        step(data(0, rank, 4, models.NUM_INPUTS))
    return [parameter.grad for parameter in model.parameters()]


def _compiled_in_place(wrap: Wrap, module: nn.Module) -> nn.Module:
    model = wrap(module)
    model.compile(backend="eager")
    return model


AGAINST_TORCH: dict[str, Callable[[Wrap, int], Result]] = {
    program.__name__: program
    for program in (
        generator_and_discriminator,
        gradient_penalty,
        averages_of_a_model,
        accumulation_and_clipping,
        two_forwards,
        complex_parameters,
        loading_a_state,
        thawing_by_wrapping_again,
        loader_processes,
        compiled_step,
        compiled_accumulation,
    )
} | {
    "compiled_outside": _compiled(lambda wrap, module: torch.compile(wrap(module), backend="eager")),
    "compiled_inside": _compiled(lambda wrap, module: wrap(torch.compile(module, backend="aot_eager"))),
    "compiled_in_place": _compiled(_compiled_in_place),
}


def communication_in_compiled_code(comm: Communicator) -> None:
    """What is compiled around it runs as it would otherwise, on the values of each call."""
    peer = 1 - comm.rank

    def program(x: Tensor) -> Tensor:
        y = x * 2
        comm.all_reduce(y)
        work = comm.all_reduce(y, ReduceOp.MAX, async_op=True)
        z = comm.empty(x.shape, x.dtype).copy_(x)
        work.wait()
        receive = comm.irecv(z, peer)
        comm.send(x + 1, peer)
        receive.wait()
        comm.barrier()
        return y + z + sum(comm.all_gather_object(comm.rank))

    compiled = torch.compile(program, backend="eager")
    for step in range(3):
        inputs = data(step, comm.rank, 5)
        assert torch.equal(compiled(inputs), program(inputs))


def batch_normalisation_over_all_ranks(comm: Communicator) -> None:
    """As one process on the joined batch, also where the model is compiled."""
    for compiled in (False, True):
        alone, module = built(models.batch_norm), convert_sync_batchnorm(built(models.batch_norm), comm)
        model = DistributedDataParallel(module, comm)
        optimizers = sgd(alone), sgd(model)
        called = torch.compile(model, backend="eager") if compiled else model
        for step in range(3):
            everything = [data(step, rank, 4, models.NUM_INPUTS) for rank in range(comm.world_size)]
            for forward, inputs, optimizer in zip(
                (alone, called), (torch.cat(everything), everything[comm.rank]), optimizers, strict=True
            ):
                optimizer.zero_grad()
                forward(inputs).square().mean().backward()
                optimizer.step()
        for value, expected in zip(module.state_dict().values(), alone.state_dict().values(), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)


def an_optimizer_per_parameter(comm: Communicator) -> None:
    """Each steps when its gradient is reduced: as one optimizer would."""
    model, plain = (DistributedDataParallel(built(models.mlp), comm, bucket_cap_mb=1e-4) for _ in range(2))
    optimizers = {parameter: torch.optim.AdamW([parameter], lr=0.01) for parameter in model.parameters()}
    reference = torch.optim.AdamW(plain.parameters(), lr=0.01)

    def step_one(parameter: nn.Parameter) -> None:
        optimizers[parameter].step()
        parameter.grad = None

    model.register_reduced_grad_hook(step_one)
    for step in range(3):
        _step(plain, reference, step, comm.rank)
        model(data(step, comm.rank, 4, models.NUM_INPUTS)).square().mean().backward()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


OURS: dict[str, Callable[[Communicator], None]] = {
    program.__name__: program
    for program in (communication_in_compiled_code, batch_normalisation_over_all_ranks, an_optimizer_per_parameter)
}


def with_torch(directory: Path, names: list[str]) -> None:
    dist.init_process_group("gloo")
    for name in names:
        torch.save(AGAINST_TORCH[name](TorchDDP, dist.get_rank()), directory / f"{name}-{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


def compare(comm: Communicator, name: str, directory: Path) -> None:
    expected = torch.load(directory / f"{name}-{comm.rank}.pt")
    got = AGAINST_TORCH[name](lambda module: DistributedDataParallel(module, comm), comm.rank)
    for value, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-9, atol=1e-9)


def run(make: str, name: str, directory: Path) -> str:
    """Return what went wrong with a program on a communicator; it does not keep the next ones from running."""
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    try:
        with made_by(make)() as comm:
            OURS[name](comm) if name in OURS else compare(comm, name, directory)
            comm.barrier()
    except Exception:  # whatever it is, the test of this program shows it
        return traceback.format_exc()
    finally:
        faulthandler.cancel_dump_traceback_later()
    return ""


def main(directory: Path, *wanted: str) -> None:
    torch.set_num_threads(1)
    names = {make: of_make.split(",") for make, of_make in (each.split(":") for each in wanted)}
    if "torch" in names:
        return with_torch(directory, names["torch"])
    first = next(iter(names))

    def rank() -> None:
        who = f"{threading.current_thread().name}-{torch.distributed.get_node_local_rank(0)}"
        with open(directory / f"outcomes-{first}-{who}.jsonl", "w", encoding="utf-8") as file:
            for make in names:
                for name in names[make]:
                    file.write(json.dumps({"make": make, "name": name, "failure": run(make, name, directory)}) + "\n")
                    file.flush()

    if "thread" in first:
        spawn_threads(rank, WORLD_SIZE)
    else:
        rank()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
