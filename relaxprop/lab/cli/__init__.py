"""The command line.

May import: nothing of this project.
"""
