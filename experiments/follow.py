"""Follows a gradient: ``python experiments/follow.py comm=ring``.

Two ranks take a few real steps. For the last one it is recorded which functions of the project are entered between
``loss.backward()`` and the transport's send and receive: everything, whatever it does there. They are printed in the
order in which they were first entered, and written with their code as a page.
"""

from __future__ import annotations

import functools
import io
import keyword
import re
import textwrap
import tokenize
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from html import escape
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import nn

import backends
import minidist
from experiments.measuring.sources import Function
from experiments.measuring.trail import Stop, Trail
from experiments.running import optim
from experiments.running.build import build, communicator
from experiments.running.run import CONF, main, on_ranks
from experiments.running.train import comm_name
from experiments.tasks import data
from experiments.tasks.datasets import loader
from minidist.communicator import Communicator
from minidist.config import Config
from minidist.ddp import DistributedDataParallel
from minidist.launch import counted_ranks
from minidist.training.seed import seed_everything

TEMPLATE = Path(__file__).parent / "drawing" / "follow.html"
KINDS = {tokenize.STRING: "q", tokenize.COMMENT: "i"}
"""The element of the page that a token stands in; keywords in b."""
NUM_WARM = 2
"""Steps before the one that is followed: the first proves the schedule and takes memory."""


def train_steps(cfg: DictConfig, checked: Config, comm: Communicator, trail: Trail) -> None:
    """Take some steps, and record the backward pass of the last one on rank 0."""
    seed_everything(checked.engine.seed, comm.rank)
    chosen = data.load(checked.data, comm, checked.engine.seed)
    module = build(cfg.model, "model", shape=chosen.shape, num_classes=chosen.num_classes).to(comm.device_type)
    ddp = checked.ddp
    hook = build(cfg.ddp.hook, "ddp.hook")
    model = DistributedDataParallel(
        module, comm, ddp.bucket_cap_mb, ddp.broadcast_buffers, ddp.find_unused_parameters, hook, ddp.direct_gradients
    )
    optimizer = optim.optimizer(cfg, model)
    loss_fn = nn.CrossEntropyLoss()
    batches = loader(chosen.train, comm.rank, comm.world_size, checked.data.batch_size, 0, True, checked.engine.seed)
    inputs, targets = (tensor.to(comm.device_type) for tensor in next(iter(batches)))
    for number in range(NUM_WARM + 1):
        optimizer.zero_grad()
        loss = loss_fn(model(inputs), targets)
        followed = number == NUM_WARM and comm.rank == 0
        if followed:
            loss.register_hook(lambda _: trail.join())
        with trail.recording() if followed else nullcontext():
            loss.backward()
        optimizer.step()
    comm.barrier()  # a rank that leaves is told to the others, which is no part of the step that rank 0 may still be in


def follow(cfg: DictConfig, checked: Config, trail: Trail) -> None:
    """Train as one of the ranks; rank 0 prints the trail, and writes path.txt and path.html."""
    with communicator(cfg.comm) as comm:
        train_steps(cfg, checked, comm, trail)
    if comm.rank == 0:
        stops = trail.stops()
        path = Path(HydraConfig.get().runtime.output_dir) / "path"
        text = "\n".join([*lines(stops), "", total(stops)])
        path.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
        what = f"The path of one gradient, comm={comm_name()}, {counted_ranks(comm.world_size)}"
        path.with_suffix(".html").write_text(page(what, stops), encoding="utf-8")
        print(f"{text}\nwritten: {path}.txt, .html", flush=True)


def total(stops: Sequence[Stop]) -> str:
    """Return how long the trail is."""
    files = {stop.function.file for stop in stops}
    return f"{len(stops)} functions, {sum(counted(stops))} lines of code in {len(files)} files"


def counted(stops: Sequence[Stop]) -> list[int]:
    """Return the lines of code of each function, each line once: those of a function inside of another are its own."""
    functions = [stop.function for stop in stops]
    return [function.lines(functions) for function in functions]


def lines(stops: Sequence[Stop]) -> list[str]:
    """Return a line per function: where it is, its name beneath its caller, its lines of code, and its purpose."""
    rows = [
        (f"{stop.function.file}:{stop.function.line}", "  " * stop.depth + stop.function.name, str(num_lines))
        for stop, num_lines in zip(stops, counted(stops), strict=True)
    ]
    place, name, count = (max((len(row[column]) for row in rows), default=0) for column in range(3))
    return [
        f"{row[0]:<{place}}  {row[1]:<{name}}  {row[2]:>{count}}  {stop.function.purpose}".rstrip()
        for row, stop in zip(rows, stops, strict=True)
    ]


def page(title: str, stops: Sequence[Stop]) -> str:
    """Return one HTML file that shows the code of each function, with a list to jump to."""
    links = [_link(number, stop) for number, stop in enumerate(stops, start=1)]
    sections = [_section(number, *each) for number, each in enumerate(zip(stops, counted(stops), strict=True), start=1)]
    parts = {"title": escape(title), "total": total(stops), "list": "\n".join(links), "functions": "\n".join(sections)}
    template = TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _link(number: int, stop: Stop) -> str:
    name = ".".join(stop.function.name.split(".")[-2:])
    return f'<a href="#f{number}" style="padding-left: {0.8 + 0.5 * stop.depth:.1f}rem">{escape(name)}</a>'


def _section(number: int, stop: Stop, num_lines: int) -> str:
    function = stop.function
    purpose = re.sub(r"(`+)(.+?)\1", r"<code>\2</code>", escape(function.purpose))
    code = [f'<span data-line="{line}">{text}</span>' for line, text in enumerate(marked(function), function.start)]
    return (
        f'<section id="f{number}">\n<h2>{escape(function.name)}</h2>\n'
        f'<div class="place">{escape(function.file)}:{function.line} · {num_lines} lines of code</div>\n'
        f"<p>{purpose}</p>\n<pre>{''.join(code)}</pre>\n</section>"
    )


def marked(function: Function) -> list[str]:
    """Return the lines of a function as HTML that tells keywords, strings and comments apart."""
    source = textwrap.dedent(function.source)
    text = source.splitlines()
    marks: dict[int, list[tuple[int, int, str]]] = defaultdict(list)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = "b" if keyword.iskeyword(token.string) else KINDS.get(token.type)
        first, start = token.start
        last, end = token.end
        for row in range(first, last + 1) if kind is not None else ():  # a string may go over several lines
            begin = start if row == first else 0
            finish = end if row == last else len(text[row - 1])
            marks[row].append((begin, finish, str(kind)))
    return [_line(line, marks[row]) for row, line in enumerate(text, start=1)]


def _line(line: str, marks: Sequence[tuple[int, int, str]]) -> str:
    parts = list[str]()
    done = 0
    for begin, finish, kind in marks:
        parts.append(f"{escape(line[done:begin])}<{kind}>{escape(line[begin:finish])}</{kind}>")
        done = finish
    return "".join(parts) + escape(line[done:])


@hydra.main(version_base="1.3", config_path=CONF, config_name="follow")
def experiment(cfg: DictConfig) -> None:
    trail = Trail(minidist, backends)
    with trail.installed():
        on_ranks(cfg, functools.partial(follow, trail=trail))


if __name__ == "__main__":
    main(experiment)
