"""Recipes: the schema, loading with exact error positions, and the learning contract."""
