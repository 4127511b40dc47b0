"""A model and a scheme -> a checkpoint, and what it weighs before it is made."""
