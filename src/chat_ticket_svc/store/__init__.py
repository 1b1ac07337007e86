"""PostgreSQL: the SQL statements, beside the functions that run them, and the connections."""
