"""Other networks than the plain one, each a file: separable ones, and several columns."""
