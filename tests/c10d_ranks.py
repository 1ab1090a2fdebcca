"""What each rank of a world runs: ``python -m tests.c10d_ranks <program> <backend> <folder>``.

A program is a function of a module of tests/c10d_programs, such as ``training.stock_ddp``.
"""

from __future__ import annotations

import pkgutil
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def main() -> None:
    name, backend, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    program = pkgutil.resolve_name(f"tests.c10d_programs.{name}")
    dist.init_process_group(backend, timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    torch.save(program(folder), folder / f"{name}-{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
