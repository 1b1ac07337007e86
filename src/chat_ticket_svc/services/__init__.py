"""The servicers: each validates a request, calls the store, and converts the result.

They contain no SQL, and let errors pass to rpc/middleware.py.
"""
