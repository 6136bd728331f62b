"""What ``scripts/bench predicted`` measures."""
