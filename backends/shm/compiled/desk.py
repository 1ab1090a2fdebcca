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
EVERYBODY = -1
"""The root of a plan where every rank offers something."""

DONE, AWAY, DISAGREED = 0, 1, 2
"""What a kernel returns: it is done, a rank has not come yet, or it came with another signature."""
