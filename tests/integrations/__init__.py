"""The wrapper in the tools that people train with, beside the plain module."""
