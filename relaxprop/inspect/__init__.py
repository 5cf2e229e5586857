"""Looks at a wrapped model, and leaves it as it was: `alignment`, `convergence` and `locality`.

May import: nothing of this project.
"""
