"""Integrations with other libraries, one file each. None is imported until it is used."""
