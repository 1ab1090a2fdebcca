"""What the executor of schedules does with tensors: messages, reductions, memory that is kept."""
