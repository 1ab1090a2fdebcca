"""Beneath the communicator: who a rank is, how its operations are checked, staged, run, counted and told apart."""
