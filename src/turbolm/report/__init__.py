"""Read the metrics of a run and write its HTML report. Torch-free."""
