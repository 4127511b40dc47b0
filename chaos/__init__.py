"""The proof that not one row is lost and not one repeated, whatever fails: `make chaos`, or `python -m chaos`."""
