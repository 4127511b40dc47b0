"""What is fixed before a worker starts: drafted, stored create-only, compared with what is committed."""
