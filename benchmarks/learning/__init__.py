"""Whether the methods learn: all of them on the demo's two tasks, whose gold score is known."""
