"""The benchmarks: what they run, that they would notice a wrong result, and what they write."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from backends.thread import ThreadCommunicator, run_threads
from experiments.bench import check
from experiments.drawing.pictures import draw_bandwidth, draw_steps
from experiments.measuring.collectives import Repeated
from experiments.measuring.compare import communicators, interleaved, sizes
from experiments.running.choices import at_least, several
from experiments.running.tables import table, write_csv, write_json
from minidist.collective import COLLECTIVES
from minidist.communicator import Communicator, ReduceOp
from minidist.errors import ConfigError
from tests.inputs import BITWISE
from tests.test_commands import ROOT, only_run, run_python, run_ranks

CONF = ROOT / "conf" / "bench.yaml"
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def config(**changes: object) -> DictConfig:
    cfg = OmegaConf.load(CONF)
    assert isinstance(cfg, DictConfig)
    return DictConfig({**{key: value for key, value in cfg.items() if key not in ("defaults", "hydra")}, **changes})


@pytest.mark.parametrize("collective", [name for name, one in COLLECTIVES.items() if one.has_tensor])
@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("is_async", [False, True])
def test_every_collective_has_a_closed_form(collective: str, world_size: int, is_async: bool) -> None:
    cfg = config(collective=collective, async_op=is_async)
    assert run_threads(lambda comm: Repeated(cfg, comm, 1000).num_wrong(), world_size) == [0] * world_size


@pytest.mark.parametrize("op", ReduceOp)
@pytest.mark.parametrize("collective", ["all_reduce", "reduce", "reduce_scatter"])
def test_every_op_has_a_closed_form(collective: str, op: ReduceOp) -> None:
    dtype = "int64" if op in BITWISE else "float64"
    cfg = config(collective=collective, op=op.value, dtype=dtype)
    assert run_threads(lambda comm: Repeated(cfg, comm, 50).num_wrong(), 2) == [0, 0]


def test_all_gather_in_place() -> None:
    cfg = config(collective="all_gather", in_place=True)
    assert run_threads(lambda comm: Repeated(cfg, comm, 50).num_wrong(), 2) == [0, 0]


def test_fresh_input_is_written_before_each_call() -> None:
    def job(comm: Communicator) -> tuple[list[str], bool]:
        collective = Repeated(config(), comm, 50)
        collective.run()
        calls: list[str] = []

        def renew() -> None:
            collective.renew()
            calls.append("renew")

        def run() -> None:
            collective.run()
            calls.append("run")

        interleaved({"all_reduce": run}, comm, warmup=1, iterations=1, burst=2, before={"all_reduce": renew})
        return calls, collective.num_wrong() == 0

    one_turn = ["run", "renew", "run", "renew", "run"]
    assert run_threads(job, 2) == [(2 * one_turn, True)] * 2


class _Wrong(ThreadCommunicator):
    """Adds one to an element too many."""

    def _all_reduce(self, tensor: torch.Tensor, op: ReduceOp, timeout_s: float) -> None:
        super()._all_reduce(tensor, op, timeout_s)
        tensor[3] += self.rank


def test_wrong_elements_are_counted() -> None:
    def job(comm: Communicator) -> int:
        with _Wrong() as wrong:
            return Repeated(config(), wrong, 50).num_wrong()

    assert run_threads(job, 3) == [0, 1, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"collective": "all_recuce"}, "collective must be one of all_reduce, reduce, .*, got all_recuce"),
        ({"op": "add"}, "op must be one of sum, avg, min, max, product, band, bor, bxor, got add"),
        ({"memory": "gpu"}, "memory must be one of empty, ordinary, got gpu"),
        ({"dtype": "float8"}, "dtype must be one of float64, .*, got float8"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"factor": 1}, "factor must be at least 2, got 1"),
        ({"max_bytes": 8, "min_bytes": 16}, "max_bytes must be at least min_bytes = 16, got 8"),
        ({"in_place": True}, "in_place=true is for all_gather"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, object], message: str) -> None:
    check(config())
    with pytest.raises(ConfigError, match=message):
        check(config(**changes))


ALLOWED = ["cnn", "mlp"]


@pytest.mark.parametrize(("given", "names"), [(["mlp", "cnn"], ["mlp", "cnn"]), (["cnn"], ["cnn"]), ("cnn", ["cnn"])])
def test_a_choice_of_several_is_a_list(given: object, names: list[str]) -> None:
    assert several(DictConfig({"models": given}), "models", ALLOWED) == names


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], r"models must be a list of one or more values, got \[\]; write models=\[cnn,mlp\]"),
        (None, "models must be a list of one or more values, got None"),
        ({"cnn": 1}, "models must be a list of one or more values, got {'cnn': 1}"),
        (["cnn", "vgg"], "models must be of cnn, mlp, got vgg"),
        ("cnn mlp", "models must be of cnn, mlp, got cnn mlp"),
        (["cnn", "cnn"], r"models has cnn twice: \[cnn, cnn\]"),
    ],
)
def test_a_wrong_choice_is_refused_with_what_there_is(given: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        several(DictConfig({"models": given}), "models", ALLOWED)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([4, 0], "world_sizes must be at least 1, got 0"),
        (0, "world_sizes must be at least 1, got 0"),
        (["many"], "world_sizes must be a whole number of at least 1, got many"),
        (True, "world_sizes must be a whole number of at least 1, got True"),
        (2.5, "world_sizes must be a whole number of at least 1, got 2.5"),
        (math.nan, "world_sizes must be a whole number of at least 1, got nan"),
    ],
)
def test_numbers_are_checked_alone_and_in_lists(given: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        at_least(DictConfig({"world_sizes": given}), world_sizes=1)


def test_where_the_bound_is_a_float_so_may_be_what_is_given() -> None:
    at_least(DictConfig({"caps": [1, 2.5]}), caps=1.0)
    with pytest.raises(ConfigError, match=r"caps must be at least 1\.0, got nan"):
        at_least(DictConfig({"caps": [math.nan]}), caps=1.0)


@pytest.mark.timeout(300)
def test_bench_step_measures_the_models_that_are_chosen(tmp_path: Path) -> None:
    small = ("architectures.mlp.width=16", "architectures.cnn.width=2", "batch_size=2", "warmup=0", "iterations=1")
    program = str(ROOT / "experiments" / "bench_step.py")
    done = run_ranks(tmp_path, 2, program, "models=[cnn,mlp]", "comms=gloo", *small)
    assert done.returncode == 0, done.stderr
    rows = json.loads((only_run(tmp_path) / "bench_step.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["cnn"] * 6 + ["mlp"] * 6
    others = ["no communication", "torch DDP, gloo", "torch DDP, shm"]
    variants = [*others, "gloo", "gloo, sharded", "gloo, sharded, direct"]
    assert [row["variant"] for row in rows[:6]] == variants


def test_bench_c10d_compares_a_communicator_with_torch_over_it(tmp_path: Path) -> None:
    program = str(ROOT / "experiments" / "bench_c10d.py")
    sizes = ("min_bytes=1024", "max_bytes=8192", "warmup=0", "iterations=1", "burst=2")
    done = run_ranks(tmp_path, 2, program, "spec=ring/gloo", *sizes)
    assert done.returncode == 0, done.stderr
    rows = json.loads((only_run(tmp_path) / "bench_c10d.json").read_text())["rows"]
    variants = ["ring/gloo itself", "torch.distributed, ring/gloo", "torch.distributed, gloo"]
    assert [(row["bytes"], row["variant"]) for row in rows] == [(n, v) for n in (1024, 8192) for v in variants]
    assert all(row["latency_us"] > 0 for row in rows)


def test_bench_checked_compares_each_cadence_with_none(tmp_path: Path) -> None:
    program = str(ROOT / "experiments" / "bench_checked.py")
    small = ("model.width=2", "batch_size=2", "warmup=1", "iterations=2", "burst=2", "every=[1,3]")
    done = run_ranks(tmp_path, 2, program, "comms=[gloo,ring]", *small)
    assert done.returncode == 0, done.stderr
    rows = json.loads((only_run(tmp_path) / "bench_checked.json").read_text())["rows"]
    variants = [(comm, checked) for comm in ("gloo", "ring") for checked in ("no", "every=1", "every=3")]
    assert [(row["comm"], row["checked"]) for row in rows] == variants
    assert all(row["latency_us"] > 0 and row["step_ratio"] > 0 for row in rows)
    assert [row["step_ratio"] for row in rows if row["checked"] == "no"] == [1, 1]


@pytest.mark.parametrize(
    ("script", "setting", "message"),
    [
        ("bench", "comms=[gloo,telepathy]", "comms must be of auto, binomial, bruck,"),
        ("calibrate", "transport=[gloo,shm]", "transport must be of auto, binomial, bruck,"),
        ("predict", "model=[cnn,mlp]", "model must be one choice, got [cnn,mlp]"),
        ("draw", "network=[flat,torus]", "network must be one choice, got [flat,torus]"),
    ],
)
def test_every_program_says_what_there_is_to_choose(script: str, setting: str, message: str, tmp_path: Path) -> None:
    program = str(ROOT / "experiments" / f"{script}.py")
    done = run_python(tmp_path, program, setting, f"hydra.run.dir={tmp_path}/run", variables=ALONE)
    assert done.returncode == 2
    assert f"error: {message}" in done.stderr
    assert "Traceback" not in done.stderr


def test_sizes_are_powers_of_the_factor() -> None:
    assert list(sizes(config(min_bytes=1024, max_bytes=20_000, factor=4))) == [1024, 4096, 16384]


def test_table_aligns_numbers_right_and_words_left() -> None:
    rows = [{"name": "a", "time": 1.0}, {"name": "longer", "time": 123.456}]
    assert table(rows, {"name": "", "time": ".1f"}).split("\n") == ["name     time", "a         1.0", "longer  123.5"]


def test_what_is_not_known_is_a_dash() -> None:
    rows = [{"name": "a", "time": None}, {"name": "b", "time": 1.5}]
    assert table(rows, {"name": "", "time": ".1f"}).split("\n") == ["name  time", "a        -", "b      1.5"]


def test_files_hold_the_rows(tmp_path: Path) -> None:
    rows = [{"a": 1, "b": 2.5}]
    write_csv(tmp_path / "t.csv", rows, ["b"])
    assert (tmp_path / "t.csv").read_text().split() == ["b", "2.5"]
    write_json(tmp_path / "t.json", {"about": "this"}, rows)
    assert json.loads((tmp_path / "t.json").read_text()) == {"about": "this", "rows": rows}
    write_json(tmp_path / "t.json", {"sizes": (1, math.inf)}, [{"loss": math.nan, "time": -math.inf, "name": "a"}])
    row = {"loss": None, "time": None, "name": "a"}  # NaN and Infinity are no JSON, though Python reads them
    assert json.loads((tmp_path / "t.json").read_text()) == {"sizes": [1, None], "rows": [row]}


def test_pictures_are_drawn(tmp_path: Path) -> None:
    bandwidth = [
        {"comm": comm, "bytes": 2**k, "busbw_GBps": k + 1.0, "latency_us": 2.0 * k + 1}
        for comm in ("gloo", "limit")
        for k in (10, 20)
    ]
    draw_bandwidth(tmp_path / "a.png", "title", bandwidth)
    steps = [
        {"model": model, "variant": variant, "parameters_M": 1.0, "step_ms": 2.0, "exposed_ms": exposed}
        for model in ("cnn", "mlp")
        for variant, exposed in (("none", 0.0), ("shm", -0.5), ("gloo", 1.0))
    ]
    draw_steps(tmp_path / "b.png", "title", steps)
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_one_rank_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with (
        pytest.raises(ConfigError, match=r"nothing to compare on one rank; start with torchrun"),
        communicators(["gloo"]),
    ):
        pass


@pytest.mark.timeout(300)
def test_bench_compares_checks_and_writes(tmp_path: Path) -> None:
    settings = ("comms=[gloo,ring,shm]", "max_bytes=4096", "warmup=1", "iterations=2", "burst=2")
    done = run_ranks(tmp_path, 2, str(ROOT / "experiments" / "bench.py"), *settings)
    assert done.returncode == 0, done.stderr
    written = only_run(tmp_path)
    with (written / "bench.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["comm"] for row in rows] == ["gloo", "ring", "shm", "limit"] * 2
    assert all(row["wrong"] == "0" and float(row["latency_us"]) > 0 for row in rows)
    assert len(json.loads((written / "bench.json").read_text())["rows"]) == 8
    assert (written / "bench.png").stat().st_size > 10_000
