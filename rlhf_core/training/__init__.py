"""The engine of all trainers: the loop, its files, and the references of policies."""
