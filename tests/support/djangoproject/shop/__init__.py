"""Its one application."""
