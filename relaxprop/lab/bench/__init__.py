"""What a training step costs beside backpropagation's.

May import: nothing of this project.
"""
