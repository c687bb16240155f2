"""The order of training: document streams, windows, packing and the plan table."""
