"""Servicers: a request in, store calls, a response out. No SQL, no try/except."""
