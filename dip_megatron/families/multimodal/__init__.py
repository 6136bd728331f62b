"""Models that keep their class and their code: what their forward calls, the encoders, is cut off at the call."""
