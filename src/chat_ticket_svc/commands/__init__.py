"""The commands of chat-ticket-svc: one module each, with its arguments and what it does."""
