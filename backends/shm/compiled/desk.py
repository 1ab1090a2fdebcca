"""The words that a rank's kernels share with Python: what they are told, and how far they have come.

A kernel that has waited long enough returns, and is called again with the same arguments once Python has seen to the
rest: messages, deadlines, ranks that are gone, Ctrl-C. So what it has done already stands here and not in variables.
"""

RANK, WORLD_SIZE, SIZE, SPINS, PATIENCE_NS, INLINE, STAGE, SCRATCH = (8 * word for word in range(8))
"""This rank, how many there are, bytes of a heap, how often to look, how long to wait beyond that, and places: two
offsets in every heap, and an address of this process."""
ARRIVALS, WAY, ROUND, CHIME = (8 * word for word in range(8, 12))
"""How often this collective has come to a meeting, the way it goes, its next round, and what to write into bells."""
PEER, WORD, GOAL = (8 * word for word in range(12, 15))
"""Who is waited for, for which word, and until it is how much."""
BASE = 8 * 15
"""What the count of rounds was when a schedule began."""
NUM_FIELDS = 16
HEAPS, WORDS, BASES, SOURCES, TARGETS = range(5)
"""After the fields, tables with a word for each rank: its heap, its words, what it offers; and what to combine."""

SIGNATURE, REDUCER, NBYTES, ITEMSIZE, NUM_PIECES, ROOT, NUM_READS, READS = (8 * word for word in range(8))
"""A plan: what a collective is, in bytes from its address. NBYTES are those of a piece of what is offered; a read is
(byte in the target, number of parts, rank and piece of the first part, rank and piece of the next, ...)."""
SLICE_BYTES, NUM_SLICES, LAST, NUM_ROWS, ROWS = NBYTES, NUM_PIECES, ROOT, NUM_READS, READS
"""The plan of a schedule, see backends/shm/compiled/table.py: beside SIGNATURE, REDUCER and ITEMSIZE how much of each
chunk is done at a time, how often, how much that adds to the counts of all ranks, and the rows."""
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
EVERYBODY = -1
"""The root of a plan where every rank offers something."""

DONE, AWAY, DISAGREED = 0, 1, 2
"""What a kernel returns: it is done, a rank has not come yet, or it came with another signature."""
