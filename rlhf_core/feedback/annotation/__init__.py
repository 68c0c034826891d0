"""Labels from people: what they compare, the page they work on, what becomes of the labels."""
