"""The SQL, beside the functions that run it."""
