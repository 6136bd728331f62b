"""Training loops, one file each: how to learn from a loop what DIP must know of it."""
