"""Authentication, authorization and quotas: who may call what, for which tenants, how often."""
