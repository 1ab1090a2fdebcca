"""What the entry points measure: collectives, steps, and the way of a gradient."""
