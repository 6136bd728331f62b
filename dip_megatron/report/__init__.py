"""What a run did, for people: traces, pictures, tables. ``figure`` needs matplotlib (the extra ``viz``)."""
