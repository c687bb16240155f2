"""What a run directory says: metrics and the HTML report. Torch-free."""
