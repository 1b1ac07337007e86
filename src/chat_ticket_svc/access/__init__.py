"""Who may call, for which tenants, to do what, and how much."""
