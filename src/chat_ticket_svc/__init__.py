"""chat-ticket-svc: a gRPC system of record for AI support chats, over PostgreSQL."""
