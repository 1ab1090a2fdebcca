"""Where in shared memory what is, and how much; the compiled kernels know it by the same numbers.

A rank has a line of the cache for its bell and one for all that a meeting takes, so that who waits for it fetches one::

    count | signature, offset | signature, offset | progress

A line is LINE words of 8 bytes.
"""

LINE = 8
"""Words in a cache line; a word that is waited for has one of its own."""
BELL = 0
COUNT = LINE
TICKET = LINE + 1
PROGRESS = LINE + 5
SECRET = 2 * LINE
"""Words of a rank: its bell, its counter, two tickets, its rounds, and a number that shows whose heap it is."""
NUM_WORDS = 3 * LINE
NOWHERE = -1
"""The offset of a tensor that is not in shared memory."""
INLINE_BYTES = 2**12
"""What is so small that copying it costs less than a second meeting; larger ones were faster in place and staged."""
STAGE_BYTES = 2**22
"""Twice as much per rank: in smaller ones ranks spend more time on meetings, larger ones gained nothing."""
LINE_BYTES = 8 * LINE


def share(numel: int, itemsize: int, world_size: int, rank: int) -> tuple[int, int]:
    """Return where the elements that ``rank`` owns of a tensor begin and end: whole lines, but for the last rank's."""
    lines = -(-numel * itemsize // LINE_BYTES)
    length = -(-lines // world_size) * LINE_BYTES // itemsize
    return min(rank * length, numel), min((rank + 1) * length, numel)
