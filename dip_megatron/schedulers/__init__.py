"""The schedules: DIP's search, and those it is measured against, as plans through the same simulator and verifier."""
