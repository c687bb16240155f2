"""`turbolm adapt`: write a recipe for a model that no recipe is there for. Torch-free."""
