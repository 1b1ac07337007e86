"""Code generated from protos/chat_ticket (make proto)."""
