"""What there is to learn, and the models that learn it."""
