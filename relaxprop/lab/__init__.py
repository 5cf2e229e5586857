"""The experiments of the paper, on top of the library.

May import: nothing of this project.
"""
