class Sequential:
    """Fusible operations: annotations name the class."""
