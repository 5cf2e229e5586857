"""What is made of results: tables and figures.

May import: nothing of this project.
"""
