"""What is computed from many results."""
