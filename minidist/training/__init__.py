"""Beneath the engine: how far training is, what ranks tell each other meanwhile, what is reported, kept and resumed."""
