"""How the scripts start: the command line, and the process that JAX runs in."""
