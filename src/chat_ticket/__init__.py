"""The clients of chat-ticket-svc, and the stubs that they use (make proto)."""
