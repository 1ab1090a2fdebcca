"""Says who waited where for whom: ``python -m minidist.doctor FILES``.

FILES are what ranks have written (``records-rank0.json``, ..., see docs/my_training_hangs.md), folders of these, or
dumps of torch's flight recorder. It prints what it finds for each communicator, and the last calls of each rank.
"""

from __future__ import annotations

import argparse
import io
import sys

from minidist.doctor.group import Group, grouped
from minidist.doctor.reading import files_in, read
from minidist.errors import ConfigError

NOTHING = "no rank waits for another one"


def main() -> None:
    """Read the files that the command names, and print."""
    parser = argparse.ArgumentParser(prog="python -m minidist.doctor", description=__doc__)
    parser.add_argument("files", nargs="+", help="the files, or folders with them")
    parser.add_argument("--calls", type=int, default=4, help="how many calls of each rank to show")
    given = parser.parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name can be any bytes
    try:
        groups = grouped([told for file in files_in(given.files) for told in read(file)])
    except ConfigError as error:
        parser.exit(2, f"doctor: {error}\n")
    if not groups:
        parser.exit(2, f"doctor: there are no records in {', '.join(given.files)}\n")
    for group in groups:
        _show(group, given.calls)


def _show(group: Group, num_calls: int) -> None:
    print(f"{group.name}, ranks {', '.join(map(str, group.ranks))}")
    for sentence in group.diagnosis() or [NOTHING]:
        print(f"  {sentence}")
    for line in group.table(num_calls):
        print(f"    {line}")
    print()


if __name__ == "__main__":
    main()
