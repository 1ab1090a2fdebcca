"""The plan of a step, see backends/shm/compiled/step.py: after ITEMSIZE it goes on otherwise than that of a collective.

A row is (byte in the share, bytes, addresses of two tensors of state, and NUM_NUMBERS numbers, as float64: by what to
multiply the sum of the gradients, and then those of its kind).
"""

KIND, NUM_ROWS, ROWS = (8 * word for word in range(4, 7))
NUM_NUMBERS = 9
ROW_BYTES = 8 * (4 + NUM_NUMBERS)
SGD, ADAM = range(2)
