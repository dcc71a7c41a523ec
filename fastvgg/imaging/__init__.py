"""One image: bytes to pixels, pixels to bytes, and another size."""
