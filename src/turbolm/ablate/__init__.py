"""What each trick is worth: a recipe trained with and without it, on the user's own model, data and machine."""
