"""Whole kinds of models whose gradients could go wrong in silence: each is right, or refused by name with a way out."""
