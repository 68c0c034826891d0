"""The shared parts of the methods that sample from the policy while they train it."""
