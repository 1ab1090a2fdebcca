"""From a command to ranks that train: compose, check, start, train, go on, report."""
