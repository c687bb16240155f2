"""Derive a plan from a recipe and a machine: batch arithmetic, costs, launch configurations. Torch-free."""
