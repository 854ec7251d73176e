"""The scripts, which `mnist-flax NAME` runs, too."""
