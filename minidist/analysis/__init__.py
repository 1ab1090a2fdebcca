"""What can be known of a schedule without running it: whether it is right, and how long it takes on a network."""
