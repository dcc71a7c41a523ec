"""Datasets on disk and in stores: a file per format, none of which knows what a transform does."""
