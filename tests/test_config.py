"""The configuration: every file composes, and mistakes are refused with a message that helps."""

from __future__ import annotations

import importlib.util
import pkgutil
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from backends.checked import CheckedCommunicator
from experiments.running import build, method
from experiments.running.refusal import REFUSALS, explain
from minidist import config
from minidist.errors import BackendUnavailableError, ConfigError

ROOT = Path(__file__).parent.parent
CONF = ROOT / "conf"
FILES = sorted(
    path.relative_to(CONF) for path in CONF.rglob("*.yaml") if path.parts[len(CONF.parts)] not in ("hydra", "network")
)
# networks are chosen in draw.yaml alone: tests/test_draw.py


@pytest.fixture(autouse=True)
def hydra() -> Iterator[None]:
    config.register()
    config.register_resolvers(run_id=lambda: "a_run", rank=lambda: 0)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def composed(*overrides: str, name: str = "mnist") -> DictConfig:
    return compose(name, overrides=list(overrides))


def refusal(*overrides: str) -> str:
    with pytest.raises(REFUSALS) as caught:
        config.check(composed(*overrides))
    return explain(caught.value)


def choice(path: Path) -> tuple[str, ...]:
    """The overrides that choose a file of conf/."""
    group = path.parent.as_posix()
    needed = {
        "comm/transport": ("comm=ring",),
        "comm/intra": ("comm=hierarchical",),
        "comm/inter": ("comm=hierarchical",),
        "ddp/hook/compressor": ("ddp/hook=error_feedback",),
    }
    network = ("network=flat",) if path.stem in ("paced", "virtual") else ()
    return (*needed.get(group, ()), f"{group}={path.stem}", *network)


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name], ids=str)
def test_every_choice_composes_and_is_valid(path: Path) -> None:
    checked = config.check(composed(*choice(path)))
    assert checked.engine.epochs >= 1


@pytest.mark.parametrize("path", [path for path in FILES if not path.parent.name], ids=str)
def test_every_primary_file_composes(path: Path) -> None:
    assert len(composed(name=path.stem)) > 0


@pytest.mark.parametrize("name", ["config", "mnist", "cifar10"])
def test_every_training_job_is_valid(name: str) -> None:
    assert config.check(composed(name=name)).data.name in ("mnist", "cifar10")


@pytest.mark.parametrize("group", ["comm", "model", "optim", "method"])
def test_every_target_can_be_imported(group: str) -> None:
    for path in (CONF / group).glob("*.yaml"):
        assert callable(pkgutil.resolve_name(composed(f"{group}={path.stem}")[group]._target_))


def test_ring_nests_its_transport() -> None:
    comm = composed("comm=ring", "comm/transport=mpi").comm
    assert comm._target_ == "backends.ring.RingCommunicator"
    assert comm.transport._target_ == "backends.mpi.MpiCommunicator"


@pytest.mark.parametrize("choices", [("comm=paced",), ("comm=ring", "comm/transport=paced")])
def test_what_is_paced_is_built_with_its_network(choices: tuple[str, ...]) -> None:
    nested = "comm/transport" if len(choices) == 1 else "comm/transport@comm.transport.transport"
    section = composed(*choices, f"{nested}=thread", "network=ethernet_10g", "comm.checked=true").comm
    with build.communicator(section) as comm:
        assert isinstance(comm, CheckedCommunicator)
        assert comm.world_size == 1


def test_a_network_can_be_chosen_for_what_is_paced_wherever_it_is() -> None:
    checked = config.check(composed("comm=ring", "comm/transport=paced", "network=ethernet_10g"))
    assert checked.comm["transport"]["network"] == checked.network
    assert checked.network["beta"] == 8e-10
    assert config.check(composed("comm=ring")).network is None
    assert refusal("comm=paced") == (
        "comm.network is what is chosen for network, and nothing is; write network=<name>, one of conf/network"
    )


def test_directories_have_the_run_id_and_no_clock() -> None:
    cfg = compose("mnist", return_hydra_config=True)
    assert cfg.hydra.run.dir == "outputs/a_run"
    assert cfg.hydra.sweep.dir == "multirun/a_run"
    assert not any("${now" in path.read_text() for path in CONF.rglob("*.yaml"))


def test_only_rank_0_writes_the_configuration() -> None:
    assert compose("mnist", return_hydra_config=True).hydra.output_subdir == ".hydra"
    config.register_resolvers(run_id=lambda: "a_run", rank=lambda: 1)
    assert compose("mnist", return_hydra_config=True).hydra.output_subdir is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("engine.epochs=0", "engine.epochs must be at least 1, got 0"),
        ("engine.accumulation_steps=0", "engine.accumulation_steps must be at least 1, got 0"),
        ("engine.max_grad_norm=0", "engine.max_grad_norm must be greater than 0, got 0.0"),
        ("engine.autocast=float8", "engine.autocast must be one of none, bfloat16, got float8"),
        ("engine.device=tpu", "engine.device must be one of auto, cpu, cuda, got tpu"),
        ("engine.lr_schedule=linear", "engine.lr_schedule must be one of constant, cosine, got linear"),
        ("engine.seed=-1", "engine.seed must be at least 0, got -1"),
        ("engine.keep_checkpoints=0", "engine.keep_checkpoints must be at least 1, got 0"),
        ("data.batch_size=0", "data.batch_size must be at least 1, got 0"),
        ("ddp.bucket_cap_mb=0", "ddp.bucket_cap_mb must be greater than 0, got 0.0"),
        ("launch.nproc=0", "launch.nproc must be at least 1, got 0"),
        ("launch.max_restarts=-1", "launch.max_restarts must be at least 0, got -1"),
        ("comm.timeout_s=0", "comm.timeout_s must be greater than 0, got 0"),
        ("comm.segment_bytes=8", "comm.segment_bytes must be at least 16, got 8"),
        ("comm.checked=-1", "comm.checked must be true, false, or k to compare k collectives at once, got -1"),
        ("comm.checked=soon", "comm.checked must be true, false, or k to compare k collectives at once, got 'soon'"),
        ("comm.timeout_s=soon", "comm.timeout_s must be a number, got 'soon'"),
        ("optim.lr=-1", "optim.lr must be greater than 0, got -1"),
        ("model.width=0", "model.width must be at least 1, got 0"),
        ("method=local_sgd method.period=0", "method.period must be at least 1, got 0"),
        ("method=diloco method.outer_lr=0", "method.outer_lr must be greater than 0, got 0"),
        ("method=diloco method.outer_lr=inf", "method.outer_lr must be finite, got inf"),
        ("method=diloco method.outer_momentum=nan", "method.outer_momentum must be finite, got nan"),
        ("method=streaming_diloco method.tau=-1", "method.tau must be at least 0, got -1"),
        ("optim.lr=inf", "optim.lr must be finite, got inf"),
        ("optim=sgd optim.momentum=inf", "optim.momentum must be finite, got inf"),
        ("method=streaming_diloco method.num_fragments=0", "method.num_fragments must be at least 1, got 0"),
    ],
)
def test_values_out_of_range_are_named(override: str, message: str) -> None:
    assert refusal(*override.split()) == message


@pytest.mark.parametrize(
    ("override", "num_ranks", "message"),
    [
        ("method=local_sgd method.local_after=9 method.ranks_per_worker=2", 4, "LocalSGD: local_after=9 averages the"),
        ("method=streaming_diloco method.period=4 method.tau=4", 2, "StreamingDiLoCo: tau must be below period, 4"),
        ("method=sparse_loco method.fraction=0", 2, "fraction must be above 0 and at most 1, got 0"),
        ("method=sparse_loco method.fraction=1.5", 2, "fraction must be above 0 and at most 1, got 1.5"),
        ("method=gossip", 1, "method: Gossip: there is nobody to tell with one worker; use more ranks"),
        ("method=diloco method.ranks_per_worker=2", 3, "ranks_per_worker is 2, which does not divide"),
        ("method=diloco optim.sharded=true", 2, "optim.sharded=true: it has all ranks step one model together"),
        ("method=diloco ddp/hook=int8", 2, "with DiLoCo no gradients are averaged; use ddp/hook=all_reduce"),
        (
            "method=streaming_diloco method.num_fragments=9",
            2,
            "num_fragments is 9, and there are 8 parameters",
        ),
        ("method=diloco method.outer_momentum=1", 2, "outer_momentum must be at least 0 and below 1, got 1"),
        ("ddp/hook=top_k ddp.hook.fraction=0", 2, "ddp.hook: TopK: fraction must be above 0 and at most 1, got 0"),
        ("ddp/hook=power_sgd ddp.hook.rank=0", 2, "PowerSGD: rank must be a whole number of at least 1, got 0"),
        ("ddp/hook=error_feedback ddp/hook/compressor=random_k", 2, "RandomK scales up what it sends"),
        ("ddp/hook@method.hook=top_k method=diloco method.hook.fraction=2", 2, "at most 1, got 2"),
        ("ddp.hook._target_=builtins.dict", 2, "ddp.hook makes {}, which is no hook"),
        ("method._target_=torch.nn.Identity", 2, "method._target_=torch.nn.Identity is not a Method"),
    ],
)
def test_methods_that_would_fail_on_the_way_are_refused(override: str, num_ranks: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        method.check(composed(*override.split()), num_ranks)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", [path.stem for path in (CONF / "method").glob("*.yaml")])
def test_every_method_can_be_made(name: str) -> None:
    method.check(composed(f"method={name}"), 2)


def test_pseudo_gradients_travel_by_any_hook() -> None:
    cfg = composed("method=diloco", "ddp/hook@method.hook=power_sgd")
    assert "PowerSGD(rank=2" in method.method(cfg).describe()


def test_ranges_hold_inside_of_nested_communicators() -> None:
    assert refusal("comm=ring", "comm.transport.timeout_s=-1") == (
        "comm.transport.timeout_s must be greater than 0, got -1"
    )


@pytest.mark.parametrize("shape", ["[]", "[3,0]"])
def test_synthetic_samples_have_a_shape(shape: str) -> None:
    assert refusal("data=synthetic", f"data.shape={shape}") == "data.shape must be at least 1, got 0"


@pytest.mark.parametrize(
    ("override", "key", "choices"),
    [
        ("engine.epoch=1", "engine.epoch", "epochs"),
        ("+engine.epoch=1", "epoch", "epochs"),
        ("comm.timeout=1", "comm.timeout", "timeout_s"),
        ("model.widht=1", "model.widht", "width"),
        ("engin.epochs=1", "engin", "engine"),
        ("+engin.epochs=1", "engin", "engine"),
    ],
)
def test_misspelt_keys_are_refused_with_the_choices(override: str, key: str, choices: str) -> None:
    message = refusal(override)
    assert message.startswith(f"{key} is not a setting; ")
    assert choices in message.partition(";")[2]
    assert "\n" not in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("engine.epochs=many", "engine.epochs: Value 'many' of type 'str' could not be converted to Integer"),
        ("engine.epochs=1.5", "engine.epochs: Value '1.5' of type 'float' could not be converted to Integer"),
        ("engine.resume=perhaps", "engine.resume: Value 'perhaps' is not a valid bool (type str)"),
    ],
)
def test_wrong_types_are_refused(override: str, message: str) -> None:
    assert refusal(override) == message


def test_an_unknown_choice_is_refused_with_the_others() -> None:
    choices = ", ".join(sorted(path.stem for path in (CONF / "comm").glob("*.yaml")))
    assert refusal("comm=telepathy") == f"comm=telepathy is not there to choose; comm is one of {choices}"


@pytest.mark.parametrize(
    ("override", "value", "written"),
    [
        ("hydra.run.dir=a b=c", "a b=c", "'hydra.run.dir=\"a b=c\"'"),
        ("hydra.run.dir=x(2)", "x(2)", "'hydra.run.dir=\"x(2)\"'"),
        ('data.root=an "odd" [one', 'an "odd" [one', """'data.root="an \\"odd\\" [one"'"""),
        ("data.root={a", "{a", "'data.root=\"{a\"'"),
    ],
)
def test_text_that_hydra_cannot_read_is_shown_in_quotes(override: str, value: str, written: str) -> None:
    message = refusal(override)
    assert message == f"{override}: text with such characters wants quotes inside of the shell's; write {written}"
    (word,) = shlex.split(written)
    read = composed(word) if word.startswith("data") else compose("mnist", [word], return_hydra_config=True)
    assert value in (read.data.root, read.get("hydra", read).get("run", {}).get("dir"))


@pytest.mark.parametrize("override", ["comm ring", "comm = ring"])
def test_a_space_in_the_place_of_an_equals_sign_is_named(override: str) -> None:
    assert refusal(override) == f"{override}: a setting and its value are one word, joined by =; write comm=ring"


def test_a_setting_without_a_value_is_named() -> None:
    assert refusal("engine.resume") == "engine.resume has no value; write engine.resume=<value>"


def test_what_is_no_setting_at_all_is_refused() -> None:
    assert refusal("(comm)=ring") == "(comm)=ring is not a setting; write one as name=value"


@pytest.mark.parametrize("choice", ["slurm", "submitit_slurm"])
@pytest.mark.skipif(importlib.util.find_spec("submitit") is not None, reason="there is a launcher for Slurm")
def test_a_launcher_that_is_not_installed_is_named_with_its_extra(choice: str) -> None:
    assert refusal(f"hydra/launcher={choice}") == (
        "hydra/launcher/submitit_slurm comes with Hydra's launcher for Slurm, which is not installed; "
        "pip install '.[slurm]'"
    )


def test_an_open_section_needs_a_target() -> None:
    assert refusal("ddp.hook=float16") == (
        "ddp.hook must be a section with a _target_, got 'float16'; choose one of conf/ with ddp/hook=<name>"
    )


# Communicators ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("comm", "transport", "launcher"),
    [
        ("serial", None, "none"),
        ("thread", None, "thread"),
        ("gloo", None, "torchrun"),
        ("mpi", None, "mpirun"),
        ("ring", "gloo", "torchrun"),
        ("ring", "mpi", "mpirun"),
        ("ring", "thread", "thread"),
        ("paced", "shm", "torchrun"),
    ],
)
def test_the_transport_says_what_starts_the_ranks(comm: str, transport: str | None, launcher: str) -> None:
    transports = [] if transport is None else [f"comm/transport={transport}"]
    assert build.launcher(composed(f"comm={comm}", *transports, "network=hosts_100g").comm) == launcher


def test_one_job_has_one_launcher() -> None:
    node = {"_target_": "backends.ring.RingCommunicator"}
    node["intra"] = {"_target_": "backends.torch_dist.GlooCommunicator"}
    node["inter"] = {"_target_": "backends.mpi.MpiCommunicator"}
    with pytest.raises(ConfigError, match="GlooCommunicator needs torchrun and MpiCommunicator needs mpirun"):
        build.launcher(OmegaConf.create(node))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_such_package.Comm", r"comm\._target_=no_such_package\.Comm cannot be imported"),
        ("backends.ring.NoSuchRing", r"comm\._target_=backends\.ring\.NoSuchRing cannot be imported"),
        ("torch.nn.Linear", r"comm\._target_=torch\.nn\.Linear is not a Communicator class"),
    ],
)
def test_targets_that_are_no_communicators_are_refused(target: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build.check_available(OmegaConf.create({"_target_": target}))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("comm=swing comm.schedules.all_reduce=no_such.mine", "comm.schedules.all_reduce=no_such.mine cannot"),
        ("comm=auto comm.schedules.all_gather=[backends.ring.x]", "comm.schedules.all_gather=backends.ring.x cannot"),
        ("comm=ring +comm.transport.schedules={barrier:mine}", "comm.transport.schedules.barrier=mine cannot"),
    ],
)
def test_schedules_that_cannot_be_imported_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build.check_importable(composed(*override.split()))
    assert str(caught.value).startswith(message)
    assert str(caught.value).endswith("; check the name, or set PYTHONPATH to where it lies")


@pytest.mark.parametrize("comm", ["auto", "swing", "binomial"])
def test_schedules_that_are_there_are_found(comm: str) -> None:
    build.check_importable(composed(f"comm={comm}"))


def test_a_setting_that_the_target_does_not_take_is_refused() -> None:
    section = OmegaConf.create({"_target_": "backends.serial.SerialCommunicator", "colour": "red"})
    with pytest.raises(ConfigError, match=r"comm: .*unexpected keyword argument 'colour'"):
        build.build(section, "comm")


@pytest.mark.parametrize(
    ("comm", "message"), [("serial", "serial is for one rank"), ("thread", "thread has its ranks in one process")]
)
def test_ranks_that_would_train_alone_are_refused(comm: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a communicator raises stays what it is."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BackendUnavailableError, match=message):
        build.communicator(composed(f"comm={comm}").comm)
