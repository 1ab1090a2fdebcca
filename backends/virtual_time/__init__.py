"""What ranks that are threads share so that a clock of their own says what a network would have taken."""
