"""Decodes, times and scores."""
