"""`turbolm adapt`: write a recipe for a model that has none. Torch-free."""
