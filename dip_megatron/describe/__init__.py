"""What a model is, what a batch holds, what a stage costs, and how a model is cut."""
