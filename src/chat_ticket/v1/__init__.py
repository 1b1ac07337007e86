"""Messages and stubs of package chat_ticket.v1."""
