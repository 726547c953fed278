"""Saving, loading, packing and inspecting what was saved."""
