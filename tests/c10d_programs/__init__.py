"""Programs of torch.distributed, by what they use; tests/c10d_ranks.py runs one on every rank.

A program gets an initialised process group of torch and a folder, and returns what is saved for the test to compare;
it uses torch alone, unless it says otherwise.
"""
