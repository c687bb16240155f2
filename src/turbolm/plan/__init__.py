"""What follows from a recipe and a machine: batch arithmetic, costs, the launched configurations. Torch-free."""
