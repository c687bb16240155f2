"""Measure what each trick is worth: train a recipe with and without it, on the user's model, data and machine."""
