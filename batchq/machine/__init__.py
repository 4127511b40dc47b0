"""This machine: what it has, and what batchq caches on it."""
