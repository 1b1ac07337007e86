"""What operators see of a server process: logs, metrics and traces."""
