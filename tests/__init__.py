"""Tests of fastvgg."""
