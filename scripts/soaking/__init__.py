"""The soak: long training with faults. ``scripts/soak`` runs it."""
