"""One file for each experiment: its runs, its table, its plot.

May import: nothing of this project.
"""
