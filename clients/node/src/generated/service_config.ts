// Generated from protos/chat_ticket/v1/chat_ticket_grpc_service_config.json.

export const SERVICE_CONFIG = {
  "methodConfig": [
    {
      "name": [
        {
          "service": "chat_ticket.v1.ChatSessionService",
          "method": "GetChatSession"
        },
        {
          "service": "chat_ticket.v1.ChatSessionService",
          "method": "ListChatSessions"
        },
        {
          "service": "chat_ticket.v1.ChatSessionService",
          "method": "WatchChatSession"
        },
        {
          "service": "chat_ticket.v1.ChatSessionService",
          "method": "WatchChatSessions"
        },
        {
          "service": "chat_ticket.v1.ChatMessageService",
          "method": "GetChatMessage"
        },
        {
          "service": "chat_ticket.v1.ChatMessageService",
          "method": "ListChatMessages"
        },
        {
          "service": "chat_ticket.v1.ChatMessageService",
          "method": "SearchChatMessages"
        },
        {
          "service": "chat_ticket.v1.ChatDraftService",
          "method": "GetChatDraft"
        },
        {
          "service": "chat_ticket.v1.ChatDraftService",
          "method": "ListChatDrafts"
        },
        {
          "service": "chat_ticket.v1.ChatAttachmentService",
          "method": "GetChatAttachment"
        },
        {
          "service": "chat_ticket.v1.ChatAttachmentService",
          "method": "ListChatAttachments"
        },
        {
          "service": "chat_ticket.v1.ChatTicketService",
          "method": "GetChatTicket"
        },
        {
          "service": "chat_ticket.v1.ChatTicketService",
          "method": "ListChatTickets"
        },
        {
          "service": "chat_ticket.v1.ChatTicketService",
          "method": "GetTicket"
        },
        {
          "service": "chat_ticket.v1.ChatTicketService",
          "method": "ListTickets"
        }
      ],
      "retryPolicy": {
        "maxAttempts": 5,
        "initialBackoff": "0.1s",
        "maxBackoff": "2s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": [
          "UNAVAILABLE"
        ]
      }
    }
  ],
  "retryThrottling": {
    "maxTokens": 100,
    "tokenRatio": 0.1
  }
}
