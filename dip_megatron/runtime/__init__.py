"""Executes plans: actions, transport, stages."""
