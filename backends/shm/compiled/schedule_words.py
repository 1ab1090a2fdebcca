"""The plan of a schedule, see backends/shm/compiled/table.py, and the memory of its call; as in desk.py, in bytes."""

from backends.shm.compiled.desk import NBYTES, NUM_PIECES, NUM_READS, READS, ROOT

SLICE_BYTES, NUM_SLICES, LAST, NUM_ROWS, ROWS = NBYTES, NUM_PIECES, ROOT, NUM_READS, READS
"""Beside SIGNATURE, REDUCER and ITEMSIZE: how much of each chunk is done at a time, how often, how much that adds to
the counts of all ranks, and the rows."""
ROW_BYTES = 8 * 15
HOW, WHO, GOAL_OF, FROM, FROM_PLACE, STAGED_AT, INTO, INTO_PLACE, LENGTH = (8 * word for word in range(9))
CONDITIONS = 8 * 9
"""A row: what to do, with whom, up to which count; the region that something is of, where in it, and where in the
outbox; the region that it is for, where in it, and how many bytes. Then two conditions: a rank or EVERYBODY for none, a
region of it, and whether that has to be shared."""
TAKE_COPY, TAKE_FIRST, TAKE_LAST, TELL, WAIT, STAGE_IT, PUT = range(7)
"""What rows do; the first three as in backends/shm/script.py."""
ALWAYS_STAGED, SUMS_OF_OWN = -1, -2
"""Instead of a region: the outbox, or this rank's sums."""
NUM_REGIONS = 3
OUTBOX, SUMS = (8 * word for word in range(NUM_REGIONS, NUM_REGIONS + 2))
"""The memory of a call: the addresses of its regions, 0 for none, of the outbox and of the sums."""
