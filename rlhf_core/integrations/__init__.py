"""Doors to other libraries, each one a file; none is imported before it is asked for."""
