"""Train and study handwritten-digit classifiers in JAX and Flax."""
