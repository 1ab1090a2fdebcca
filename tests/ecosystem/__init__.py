"""Programs of other libraries, which know nothing of minidist; tests/test_ecosystem.py runs them on it."""
