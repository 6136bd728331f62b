"""What families of models share: linears that defer, layers on chunks, shapes of payloads, attention, weights."""
