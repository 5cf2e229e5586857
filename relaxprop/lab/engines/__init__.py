"""How runs are computed.

May import: nothing of this project.
"""
