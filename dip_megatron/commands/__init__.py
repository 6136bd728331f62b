"""The verbs of the ``dip`` command, one module each."""
