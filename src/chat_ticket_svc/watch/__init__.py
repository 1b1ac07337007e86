"""Watching sessions: the watchers of this process, and the notifications between processes."""
