"""What the supported versions of Flax spell differently: Colab's 0.11.2, and those from 0.12 on."""

from flax import nnx

List = getattr(nnx, "List", list)
"""The container of submodules: a plain list until 0.12."""
