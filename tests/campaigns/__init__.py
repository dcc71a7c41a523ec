"""Campaigns: long searches for failures, and their short forms as tests."""
