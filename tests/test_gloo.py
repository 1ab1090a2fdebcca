"""What only Gloo can get wrong: it ends the process at a message that is longer than expected."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gloo_ranks import others
from tests.harness import ROOT, run_forked


def run_ranks(what: str, kind: str, tmp_path: Path, world_size: int) -> list[str]:
    """Run a function of tests/gloo_ranks.py on every rank; return what they wrote. A signal that ends one fails."""
    output_file = tmp_path / "output.txt"
    returncode, output = run_forked(
        "tests.gloo_ranks", what, kind, world_size=world_size, output=output_file, limit_s=100
    )
    assert returncode == 0, output
    return [line for line in output.splitlines() if line.endswith("named") or "rror" in line]


@pytest.mark.parametrize(
    ("kind", "world_size"),
    [
        ("gloo", 2),
        ("ring", 2),
        pytest.param("gloo", 4, marks=pytest.mark.slow),
        pytest.param("halving_doubling", 4, marks=pytest.mark.slow),
    ],
)
def test_no_disagreement_ends_a_process(kind: str, world_size: int, tmp_path: Path) -> None:
    lines = run_ranks("disagree", kind, tmp_path, world_size)
    assert len(lines) == world_size * 2 * len(others(1))
    assert [line for line in lines if not line.endswith(": named")] == []


@pytest.mark.parametrize("kind", ["gloo", "ring"])
def test_no_message_ends_a_process(kind: str, tmp_path: Path) -> None:
    assert run_ranks("send_others", kind, tmp_path, 2) == ["named"] * 14


def test_a_rank_may_leave_as_soon_as_it_has_come(tmp_path: Path) -> None:
    assert run_ranks("leave_at_once", "gloo", tmp_path, 2) == ["left and named"] * 2


def test_what_is_given_up_is_named_with_its_line(tmp_path: Path) -> None:
    lines = run_ranks("give_up", "gloo", tmp_path, 2)
    source = (Path(__file__).parent / "gloo_ranks.py").read_text().splitlines()
    at = next(number for number, line in enumerate(source, 1) if line.endswith("# given up"))
    assert re.match(
        r"CommTimeoutError: \[rank 0/2\] all_reduce: not every rank came within 60 s; "
        r"rank 1 is at tests/gloo_ranks.py:\d+ "
        rf"and has not called all_reduce #\d+, which rank 0 waits for at tests/gloo_ranks.py:{at}",
        lines[0],
    ), lines
    assert lines[1].startswith("CommTimeoutError: [rank 0/2] barrier: unusable since [rank 0/2] all_reduce: not every")


BACK_AT_THE_END = """
import gc, threading, time
import torch.distributed as dist
from minidist.contract.library_wait import waits_in_library

def end(phase, info):  # called when the ending interpreter collects garbage
    if phase == "start":
        print("ends", flush=True)
        store.set("key", "value")
        time.sleep(1)

def wait():
    began.set()
    store.get("key")

began, store = threading.Event(), dist.HashStore()
{call}(threading.Thread(target=wait, daemon=True)).start()
began.wait()
time.sleep(0.5)
gc.collect()
gc.disable()
gc.callbacks.append(end)
gc.enable()
"""


@pytest.mark.parametrize("call", ["waits_in_library", pytest.param("", id="alone")])
def test_a_thread_that_comes_back_from_a_library_does_not_take_the_ending_process_along(call: str) -> None:
    """As one that was left behind in Gloo does, where the interpreter takes a while to end; alone it does."""
    command = [sys.executable, "-c", BACK_AT_THE_END.format(call=call)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
    aborts = not call and sys.version_info < (3, 14)
    assert done.returncode == (-signal.SIGABRT if aborts else 0), done.stderr
    assert done.stdout.startswith("ends")
