"""The data order: document streams, windows, packing and the plan table."""
