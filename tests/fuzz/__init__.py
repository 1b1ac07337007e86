"""Hostile requests for every RPC of the server: `make fuzz`."""
