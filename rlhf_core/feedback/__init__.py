"""Feedback on responses: rewards, judges, and candidates to compare."""
