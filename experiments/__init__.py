"""Runnable experiments: compose, build, run, report."""
