"""The commands of chat-ticket-svc: each module declares its arguments and runs the command."""
