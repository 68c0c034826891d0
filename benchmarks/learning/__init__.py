"""Whether the methods learn: every one of them on the demo's two tasks, whose gold score is known."""
