"""Starting runs: on this machine, and on clusters. Torch-free."""
