"""Fast kernels in other people's Vision Transformers."""
