"""Decode and resize images."""
